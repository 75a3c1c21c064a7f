//! Rows far from 0 for their size: what is drawn, the results in f64, and how far f32 may be from them.

use candle_dropout::MaskKey;

/// A call of LayerNorm; its `Debug` is what a failure prints.
#[derive(Clone, Debug)]
pub struct Far {
    pub rows: usize,
    pub cols: usize,
    /// Rows lie as far as this from 0, on both sides.
    pub mean: f64,
    /// Elements lie as far as this from their mean; at 0 a row is constant.
    pub deviation: f64,
    pub eps: f32,
    pub seed: u64,
}

/// The tensors of a call.
#[derive(Debug)]
pub struct Tensors {
    pub x: Vec<f32>,
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub dy: Vec<f32>,
}

/// A result in f64, and the root of the sum of squares of the terms of its largest element.
#[derive(Debug, Default)]
pub struct Exact {
    pub values: Vec<f64>,
    terms: f64,
}

impl Far {
    pub fn tensors(&self) -> Tensors {
        let uniform = |tensor: u64, i: usize| {
            let bits = MaskKey::derive(self.seed ^ tensor << 60, i as u64).bits() >> 11;
            bits as f64 / (1u64 << 52) as f64 - 1.
        };
        let of = |tensor: u64, len: usize| (0..len).map(|i| uniform(tensor, i) as f32).collect();
        let x = |i: usize| self.mean * uniform(1, i / self.cols) + self.deviation * uniform(2, i);
        Tensors {
            x: (0..self.rows * self.cols).map(|i| x(i) as f32).collect(),
            weight: of(3, self.cols),
            bias: of(4, self.cols),
            dy: of(5, self.rows * self.cols),
        }
    }
}

impl Tensors {
    /// `y`, `dx`, `dweight` and `dbias` of LayerNorm, in f64 from these very numbers.
    pub fn exact(&self, eps: f32) -> [Exact; 4] {
        let cols = self.weight.len();
        let [mut y, mut dx, mut dweight, mut dbias] = [(); 4].map(|()| Exact::default());
        (dweight.values, dbias.values) = (vec![0.; cols], vec![0.; cols]);
        let (mut dweight_terms, mut dbias_terms) = (vec![0.; cols], vec![0.; cols]);
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        for (x, dy) in self.x.chunks(cols).zip(self.dy.chunks(cols)) {
            // Differences of neighbours in f32 are exact in f64, so of a constant row nothing is left.
            let near: Vec<f64> = x.iter().map(|v| f64::from(*v) - f64::from(x[0])).collect();
            let mean_near = mean(&near);
            let left: Vec<f64> = near.iter().map(|v| v - mean_near).collect();
            let variance = left.iter().map(|v| v * v).sum::<f64>() / cols as f64;
            let rstd = 1. / (variance + f64::from(eps)).sqrt();
            let h: Vec<f64> = left.iter().map(|v| v * rstd).collect();
            let product = |(dy, weight): (&f32, &f32)| f64::from(*dy) * f64::from(*weight);
            let g: Vec<f64> = dy.iter().zip(&self.weight).map(product).collect();
            let mean_g = mean(&g);
            let mean_gh = g.iter().zip(&h).map(|(g, h)| g * h).sum::<f64>() / cols as f64;
            for (j, (h, g)) in h.iter().zip(&g).enumerate() {
                let [weight, bias, dy] = [self.weight[j], self.bias[j], dy[j]].map(f64::from);
                y.values.push(h * weight + bias);
                y.terms = y.terms.max((h * weight).hypot(bias));
                dx.values.push((g - mean_g - h * mean_gh) * rstd);
                dx.terms = dx.terms.max(g.hypot(mean_g).hypot(h * mean_gh) * rstd);
                dweight.values[j] += dy * h;
                dweight_terms[j] += (dy * h).powi(2);
                dbias.values[j] += dy;
                dbias_terms[j] += dy * dy;
            }
        }
        let largest_root = |terms: Vec<f64>| terms.into_iter().fold(0., f64::max).sqrt();
        dweight.terms = largest_root(dweight_terms);
        dbias.terms = largest_root(dbias_terms);
        [y, dx, dweight, dbias]
    }
}

impl Exact {
    fn largest(&self) -> f64 {
        self.values.iter().fold(0., |largest, x| largest.max(x.abs()))
    }

    /// False where the terms of every element cancel to a quarter of their size and less, as they do in rows of two
    /// columns, which have nothing but a mean and a deviation: rounding the terms alone is then as much as
    /// the tolerance.
    pub fn is_known(&self) -> bool {
        4. * self.largest() >= self.terms
    }

    /// The largest error over the largest element, which is to be at most [`TOLERANCE`].
    pub fn error(&self, got: &[f32]) -> f64 {
        assert_eq!(got.len(), self.values.len());
        let error = |(got, exact): (&f32, &f64)| match (f64::from(*got) - exact).abs() {
            error if error.is_nan() => f64::INFINITY,
            error => error,
        };
        let worst = got.iter().zip(&self.values).map(error).fold(0., f64::max);
        if worst == 0. { 0. } else { worst / self.largest() }
    }
}

/// Of the largest element: 17 units of rounding in f32.
pub const TOLERANCE: f64 = 1e-6;
