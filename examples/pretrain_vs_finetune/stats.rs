//! Paired comparisons over few seeds: Student's t, Holm, a bootstrap over documents.

use serde::Serialize;

use super::random::Random;

/// Mean of `values`; not a number when there are none.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard error of the mean, from the sample variance; `None` for fewer than two values.
pub fn standard_error(values: &[f64]) -> Option<f64> {
    let n = values.len() as f64;
    let centre = mean(values);
    let squares: f64 = values.iter().map(|v| (v - centre).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt())
}

/// A mean difference over paired seeds, with its two-sided 95 % t interval and p-value.
#[derive(Debug, Clone, Serialize)]
pub struct PairedDifference {
    pub mean: f64,
    /// The values that follow need at least two seeds.
    pub standard_error: Option<f64>,
    pub t: Option<f64>,
    pub low: Option<f64>,
    pub high: Option<f64>,
    pub p_value: Option<f64>,
    /// `p_value` after Holm's correction over the rates of an arm.
    pub p_holm: Option<f64>,
}

impl PairedDifference {
    pub fn new(differences: &[f64]) -> Self {
        let centre = mean(differences);
        let df = differences.len().saturating_sub(1) as f64;
        let error = standard_error(differences);
        let half = error.map(|error| error * t_quantile(0.975, df));
        // Differences that are all equal leave no doubt, unless all are zero: then t is undefined
        // and so is the test.
        let t = error.map(|error| if centre == 0.0 { 0.0 } else { centre / error });
        let p_value = t.map(|t| 2.0 * (1.0 - t_cdf(t.abs(), df)));
        Self {
            mean: centre,
            standard_error: error,
            t,
            low: half.map(|half| centre - half),
            high: half.map(|half| centre + half),
            p_value,
            p_holm: p_value,
        }
    }

    /// Whether the interval tells the difference from zero; with one seed nothing does.
    pub fn contains_zero(&self) -> bool {
        match (self.low, self.high) {
            (Some(low), Some(high)) => low <= 0.0 && high >= 0.0,
            _ => true,
        }
    }

    /// The difference's sign if it survives Holm's correction at 5 %.
    pub fn resolved(&self) -> Option<f64> {
        self.p_holm.filter(|&p| p < 0.05).map(|_| self.mean.signum())
    }
}

/// Holm's step-down correction (Holm 1979), in place.
pub fn holm(differences: &mut [PairedDifference]) {
    let mut order: Vec<usize> =
        (0..differences.len()).filter(|&i| differences[i].p_value.is_some()).collect();
    let p_value = |i: usize| differences[i].p_value.unwrap_or(1.0);
    order.sort_by(|&a, &b| p_value(a).total_cmp(&p_value(b)));
    let mut largest = 0.0f64;
    for (rank, &i) in order.iter().enumerate() {
        let corrected = differences[i].p_value.unwrap_or(1.0) * (order.len() - rank) as f64;
        largest = largest.max(corrected.min(1.0));
        differences[i].p_holm = Some(largest);
    }
}

/// Two-sided 95 % interval of the difference of mean losses when whole documents are redrawn
/// (cluster bootstrap).
///
/// `a` and `b` hold (summed loss, tokens) of the same documents; both share every draw.
pub fn bootstrap_documents(
    a: &[(f64, usize)],
    b: &[(f64, usize)],
    draws: usize,
    seed: u64,
) -> Option<(f64, f64)> {
    if a.len() < 2 || a.len() != b.len() {
        return None;
    }
    let mut random = Random::new(seed);
    let mut differences: Vec<f64> = (0..draws)
        .map(|_| {
            let (mut sum, mut tokens) = (0.0, 0);
            for _ in 0..a.len() {
                let document = random.below(a.len());
                sum += a[document].0 - b[document].0;
                tokens += a[document].1;
            }
            sum / tokens as f64
        })
        .collect();
    differences.sort_by(f64::total_cmp);
    let at = |q: f64| differences[((differences.len() - 1) as f64 * q).round() as usize];
    Some((at(0.025), at(0.975)))
}

/// Student's t distribution function with `df` degrees of freedom, for `t >= 0`.
pub fn t_cdf(t: f64, df: f64) -> f64 {
    if t.is_infinite() {
        return 1.0;
    }
    1.0 - 0.5 * regularised_beta(df / (df + t * t), df / 2.0, 0.5)
}

/// The `q` quantile (`0.5 <= q < 1`) of Student's t with `df` degrees of freedom.
pub fn t_quantile(q: f64, df: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    while t_cdf(high, df) < q {
        high *= 2.0;
    }
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if t_cdf(middle, df) < q { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// I_x(a, b) by Lentz's continued fraction (Numerical Recipes, section 6.4).
fn regularised_beta(x: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    if x > (a + 1.0) / (a + b + 2.0) {
        return 1.0 - regularised_beta(1.0 - x, b, a);
    }
    let front = (a * x.ln() + b * (1.0 - x).ln() - ln_beta(a, b)).exp() / a;
    let away_from_zero = |v: f64| if v.abs() < 1e-300 { 1e-300 } else { v };
    let (mut c, mut d) = (1.0, 1.0 / away_from_zero(1.0 - (a + b) * x / (a + 1.0)));
    let mut fraction = d;
    for m in 1..500 {
        let m = m as f64;
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        for term in [even, odd] {
            d = 1.0 / away_from_zero(1.0 + term * d);
            c = away_from_zero(1.0 + term / c);
            fraction *= c * d;
        }
        if (c * d - 1.0).abs() < 1e-15 {
            break;
        }
    }
    front * fraction
}

fn ln_beta(a: f64, b: f64) -> f64 {
    ln_gamma(a) + ln_gamma(b) - ln_gamma(a + b)
}

/// Lanczos's approximation (g = 7, 9 terms), good to 15 digits for `x > 0`.
fn ln_gamma(x: f64) -> f64 {
    const TERMS: [f64; 8] = [
        676.5203681218851,
        -1259.1392167224028,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507343278686905,
        -0.13857109526572012,
        9.984_369_578_019_572e-6,
        1.5056327351493116e-7,
    ];
    let x = x - 1.0;
    let sum = TERMS
        .iter()
        .enumerate()
        .fold(0.999_999_999_999_809_9, |sum, (i, term)| sum + term / (x + i as f64 + 1.0));
    let t = x + 7.5;
    0.5 * (2.0 * std::f64::consts::PI).ln() + (x + 0.5) * t.ln() - t + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t_quantiles_match_the_printed_tables() {
        let table = [
            (1.0, 12.706),
            (2.0, 4.303),
            (3.0, 3.182),
            (4.0, 2.776),
            (9.0, 2.262),
            (30.0, 2.042),
            (1000.0, 1.962),
        ];
        for (df, expected) in table {
            let got = t_quantile(0.975, df);
            assert!((got - expected).abs() < 5e-4, "df {df}: {got}, not {expected}");
        }
        assert!((t_quantile(0.95, 5.0) - 2.015).abs() < 5e-4);
    }

    #[test]
    fn an_interval_over_three_seeds_is_the_textbook_one() {
        // Mean 2, standard deviation 1, standard error 0.57735, t(0.975, 2) = 4.30265.
        let d = PairedDifference::new(&[1.0, 2.0, 3.0]);
        assert!((d.mean - 2.0).abs() < 1e-12);
        assert!((d.standard_error.unwrap() - 0.577350).abs() < 1e-6);
        assert!(
            (d.low.unwrap() + 0.484138).abs() < 1e-5 && (d.high.unwrap() - 4.484138).abs() < 1e-5
        );
        assert!((d.p_value.unwrap() - 0.074180).abs() < 1e-6, "{:?}", d.p_value);
        assert!(d.contains_zero() && d.resolved().is_none());
    }

    #[test]
    fn one_seed_resolves_nothing() {
        let d = PairedDifference::new(&[-3.0]);
        assert_eq!((d.mean, d.low, d.p_value), (-3.0, None, None));
        assert!(d.contains_zero() && d.resolved().is_none());
    }

    #[test]
    fn equal_differences_are_resolved_unless_they_are_zero() {
        assert_eq!(PairedDifference::new(&[0.5, 0.5, 0.5]).resolved(), Some(1.0));
        assert_eq!(PairedDifference::new(&[0.0, 0.0]).resolved(), None);
    }

    #[test]
    fn holm_steps_down_and_never_decreases() {
        let mut d = vec![PairedDifference::new(&[1.0]); 4];
        for (d, p) in d.iter_mut().zip([0.01, 0.04, 0.03, 0.005]) {
            d.p_value = Some(p);
        }
        holm(&mut d);
        let corrected: Vec<f64> = d.iter().map(|d| d.p_holm.unwrap()).collect();
        for (got, expected) in corrected.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            assert!((got - expected).abs() < 1e-12, "{corrected:?}");
        }
        // A loss that is no number leaves the other comparisons alone.
        d[3].p_value = Some(f64::NAN);
        holm(&mut d);
        assert_eq!(d[0].p_holm, Some(0.04));
    }

    #[test]
    fn the_bootstrap_brackets_a_constant_difference() {
        let b: Vec<(f64, usize)> = (0..20).map(|i| (100.0 + i as f64, 50 + i)).collect();
        let a: Vec<(f64, usize)> = b.iter().map(|&(sum, n)| (sum + 0.25 * n as f64, n)).collect();
        let (low, high) = bootstrap_documents(&a, &b, 1000, 0).unwrap();
        assert!((low - 0.25).abs() < 1e-9 && (high - 0.25).abs() < 1e-9);
        assert_eq!(bootstrap_documents(&a[..1], &b[..1], 10, 0), None);
    }
}
