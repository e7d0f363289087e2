//! Numbers and truth values as Go's flag package reads them, and numbers as mmproxy-rs and cloudflare/mmproxy do.

/// An integer with Go's prefixes (`0x`, `0o`, `0b`, a leading `0` for octal) and underscores between digits.
pub(super) fn integer(text: &str) -> Option<i64> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, digits, prefixed) = if let Some(rest) = lower.strip_prefix("0x") {
        (16, rest, true)
    } else if let Some(rest) = lower.strip_prefix("0o") {
        (8, rest, true)
    } else if let Some(rest) = lower.strip_prefix("0b") {
        (2, rest, true)
    } else if lower.len() > 1 && lower.starts_with('0') {
        (8, &lower[1..], true)
    } else {
        (10, lower.as_str(), false)
    };
    // an underscore stands between two digits, or between the prefix and the first one
    if digits.ends_with('_') || digits.contains("__") || (!prefixed && digits.starts_with('_')) {
        return None;
    }
    let digits: String = digits.chars().filter(|c| *c != '_').collect();
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return None;
    }
    let value = i64::from_str_radix(&digits, radix).ok()?;
    Some(if negative { -value } else { value })
}

/// An integer that is decimal also where it begins with 0; Go's other forms as well, which nobody else reads.
pub(super) fn decimal(text: &str) -> Option<i64> {
    text.parse().ok().or_else(|| integer(text))
}

/// What Go takes for true or false.
pub(super) fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_of_every_form() {
        for (text, value) in [
            ("0", 0),
            ("123", 123),
            ("+5", 5),
            ("-1", -1),
            ("0x7b", 123),
            ("0X7B", 123),
            ("0b101", 5),
            ("0o17", 15),
            ("017", 15),
            ("1_000", 1000),
            ("0x_7b", 123),
        ] {
            assert_eq!(integer(text), Some(value), "{text}");
        }
        for (text, value) in [("010", 10), ("08", 8), ("+5", 5), ("0x7b", 123), ("60", 60)] {
            assert_eq!(decimal(text), Some(value), "{text}");
        }
        assert_eq!(decimal("60s"), None);
        for bad in [
            "",
            "-",
            "+",
            "x",
            "0x",
            "08",
            "1.5",
            "1e3",
            "_1",
            "1_",
            "1__0",
            "--1",
            "0x+1",
            "9223372036854775808",
            " 1",
            "12a",
        ] {
            assert_eq!(integer(bad), None, "{bad}");
        }
    }
}
