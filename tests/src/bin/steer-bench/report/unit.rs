//! How numbers are printed.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// A number of things, or of things per second.
    Count,
    Gbit,
    Microseconds,
    Milliseconds,
    Nanoseconds,
    Bytes,
}

impl Unit {
    /// Prints three digits, and the unit if it is not the same for all values.
    pub(super) fn show(self, value: f64) -> String {
        let steps: &[(f64, &str)] = match self {
            Self::Count => &[(1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G")],
            Self::Gbit => &[(1.0, " Gbit/s")],
            Self::Microseconds => &[(1.0, " µs"), (1e3, " ms"), (1e6, " s")],
            Self::Milliseconds => &[(1.0, " ms"), (1e3, " s")],
            Self::Nanoseconds => &[(1.0, " ns"), (1e3, " µs")],
            Self::Bytes => &[(1.0, " B"), (1024.0, " KiB"), (1_048_576.0, " MiB"), (1_073_741_824.0, " GiB")],
        };
        // A value that would print as 1000 of one step prints as 1.00 of the next step.
        let fits = |step: &&(f64, &str)| value.abs() >= 0.9995 * step.0;
        let (size, name) = steps.iter().rev().find(fits).unwrap_or(&steps[0]);
        format!("{}{name}", digits(value / size))
    }
}

/// One value as a multiple of another.
pub(super) fn ratio(value: f64, base: f64) -> Option<String> {
    (base > 0.0 && value >= 0.0).then(|| digits(value / base))
}

/// Prints two decimals below 10, one below 100.
fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        0.0 => 0,
        small if small < 9.995 => 2,
        middle if middle < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

/// Prints a comma between thousands.
pub(super) fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_the_nearest_unit() {
        let shown = [
            (Unit::Count, 0.0, "0"),
            (Unit::Count, 203_412.0, "203k"),
            (Unit::Count, 999_900.0, "1.00M"),
            (Unit::Gbit, 38.24, "38.2 Gbit/s"),
            (Unit::Microseconds, 61.04, "61.0 µs"),
            (Unit::Microseconds, 12_340.0, "12.3 ms"),
            (Unit::Bytes, 989.0, "989 B"),
            (Unit::Bytes, 2048.0, "2.00 KiB"),
            (Unit::Milliseconds, -3.0, "-3.00 ms"),
        ];
        for (unit, value, expected) in shown {
            assert_eq!(unit.show(value), expected);
        }
    }

    #[test]
    fn a_ratio_needs_a_base() {
        assert_eq!(ratio(99.0, 100.0).as_deref(), Some("0.99"));
        assert_eq!(ratio(99.0, 0.0), None);
        assert_eq!(ratio(-1.0, 100.0), None);
    }

    #[test]
    fn thousands_are_grouped() {
        assert_eq!([1, 1000, 12_345, 1_234_567].map(grouped), ["1", "1,000", "12,345", "1,234,567"]);
    }
}
