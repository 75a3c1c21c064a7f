//! Numbers for people. A zero has no sign: what rounds to -0.000 is 0.000.

use super::super::stats::PairedDifference;
use super::arm::Spread;

/// `value` with so many digits after the point.
pub fn rounded(value: f64, digits: usize) -> String {
    without_sign_of_zero(format!("{value:.digits$}"))
}

/// The same with its sign.
pub fn signed(value: f64, digits: usize) -> String {
    without_sign_of_zero(format!("{value:+.digits$}"))
}

fn without_sign_of_zero(text: String) -> String {
    let is_zero = text.chars().all(|c| matches!(c, '+' | '-' | '0' | '.'));
    if is_zero { text.trim_start_matches(['+', '-']).to_string() } else { text }
}

pub fn interval((low, high): (f64, f64)) -> String {
    format!("[{}, {}]", signed(low, 3), signed(high, 3))
}

/// Mean and standard error.
pub fn spread(spread: &Spread) -> String {
    match spread.standard_error {
        Some(error) => format!("{} ± {}", rounded(spread.mean, 3), rounded(error, 3)),
        None => rounded(spread.mean, 3),
    }
}

/// Mean and 95 % t interval.
pub fn difference(difference: &PairedDifference) -> String {
    let mean = signed(difference.mean, 3);
    match difference.low.zip(difference.high) {
        Some(ends) => format!("{mean} {}", interval(ends)),
        None => mean,
    }
}

pub fn p_value(p: f64) -> String {
    if p < 0.001 { "< 0.001".into() } else { rounded(p, 3) }
}

/// "0, 0.1 and 0.2".
pub fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [all @ .., last] => format!("{} and {last}", all.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_has_no_sign() {
        assert_eq!([-0.0, -4e-4, 4e-4, 0.0].map(|v| signed(v, 3)), ["0.000"; 4]);
        assert_eq!([-0.0, -4e-4, 4e-4].map(|v| rounded(v, 3)), ["0.000"; 3]);
        assert_eq!((rounded(-0.04, 1), rounded(-0.4, 0)), ("0.0".into(), "0".into()));
        assert_eq!([-6e-4, 6e-4].map(|v| signed(v, 3)), ["-0.001", "+0.001"]);
        assert_eq!(interval((-1e-5, 0.0102)), "[0.000, +0.010]");
        assert_eq!(rounded(-100.0, 0), "-100");
    }

    #[test]
    fn lists_and_p_values_read_as_text() {
        let list_of =
            |items: &[&str]| list(&items.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(list_of(&["0"]), "0");
        assert_eq!(list_of(&["0", "0.1", "0.2"]), "0, 0.1 and 0.2");
        assert_eq!((p_value(4e-4), p_value(0.0123)), ("< 0.001".into(), "0.012".into()));
    }
}
