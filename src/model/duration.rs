//! Durations as people write them: a whole number and a unit.

use std::fmt;
use std::time::Duration;

use serde::Serializer;

use super::ValueError;

/// The longest duration that can be written: a year, far below where adding it to a clock overflows.
pub const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// `500ms`, `5s`, `2m`, `1h` or `1d` as a duration from 1 ms to [`MAX_DURATION`].
///
/// A bare number is refused: seconds to one reader, milliseconds (as in HAProxy) to the next.
///
/// # Errors
/// When the text is anything else.
pub fn parse_duration(text: &str) -> Result<Duration, ValueError> {
    const EXPECTED: &str = "a whole number with a unit such as 500ms, 5s, 2m, 1h or 1d";
    let wrong = |problem: String| Err(ValueError::new(problem, EXPECTED));
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        "d" => 24 * 60 * 60 * 1000,
        "" if digits > 0 => return wrong(format!("'{text}' has no unit")),
        _ => return wrong(format!("'{text}' is not a duration")),
    };
    if number.is_empty() {
        return wrong(format!("'{text}' is not a duration"));
    }
    let duration = number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(milliseconds))
        .map(Duration::from_millis);
    match duration {
        Some(Duration::ZERO) => wrong(format!("'{text}' leaves no time at all")),
        Some(duration) if duration <= MAX_DURATION => Ok(duration),
        _ => wrong(format!("'{text}' is longer than a year")),
    }
}

/// A duration in the form that [`parse_duration`] reads, in the largest unit that divides it.
pub(super) struct Written(pub(super) Duration);

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = self.0.as_millis();
        let (number, unit) = [
            (86_400_000, "d"),
            (3_600_000, "h"),
            (60_000, "m"),
            (1000, "s"),
        ]
        .into_iter()
        .find(|(size, _)| milliseconds > 0 && milliseconds.is_multiple_of(*size))
        .map_or((milliseconds, "ms"), |(size, unit)| {
            (milliseconds / size, unit)
        });
        write!(f, "{number}{unit}")
    }
}

pub(super) fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(duration.as_secs_f64())
}

pub(super) fn serialize_option<S: Serializer>(
    duration: &Option<Duration>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => serialize(duration, to),
        None => to.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_and_read() {
        for text in ["1ms", "1500ms", "5s", "90s", "2m", "36h", "365d"] {
            let duration = parse_duration(text).unwrap();
            assert_eq!(Written(duration).to_string(), text);
        }
        assert_eq!(Written(parse_duration("60s").unwrap()).to_string(), "1m");
        for bad in [
            "",
            "s",
            "5",
            "0",
            "0s",
            "-1s",
            "+1s",
            "1.5s",
            "1 s",
            "5S",
            "366d",
            "5min",
            "99999999999999999999s",
            "18446744073709551615d",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
