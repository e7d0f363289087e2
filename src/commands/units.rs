//! Numbers for people: bytes, spans of time, counts.

/// `0 B`, `999 B`, `1.2 kB`, `34 MB`: decimal units, two digits where one would say too little.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if count < 1000 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1000.0;
    let mut unit = 0;
    // 999.5 would be shown as 1000
    while value >= 999.5 {
        value /= 1000.0;
        unit += 1;
    }
    let unit = UNITS[unit];
    if value < 9.95 {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.0} {unit}")
    }
}

/// Bytes per second.
pub(super) fn byte_rate(per_second: f64) -> String {
    format!("{}/s", bytes(per_second.round().max(0.0) as u64))
}

/// Events per second.
pub(super) fn rate(per_second: f64) -> String {
    if per_second > 0.0 && per_second < 9.95 {
        format!("{per_second:.1}")
    } else {
        format!("{per_second:.0}")
    }
}

/// `320ms`, `4.2s`, `59s`, `3m12s`, `5h07m`, `12d03h`.
pub(super) fn span(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match milliseconds {
        0..1000 => format!("{milliseconds}ms"),
        1000..10_000 => format!("{seconds}.{}s", milliseconds % 1000 / 100),
        10_000..60_000 => format!("{seconds}s"),
        _ if hours == 0 => format!("{minutes}m{:02}s", seconds % 60),
        _ if days == 0 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (count, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (9_940, "9.9 kB"),
            (9_960, "10 kB"),
            (999_400, "999 kB"),
            (999_600, "1.0 MB"),
            (123_456_789, "123 MB"),
            (u64::MAX, "18 EB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(byte_rate(1234.4), "1.2 kB/s");
        assert_eq!(
            [0.0, 0.44, 9.96, 1234.0].map(rate),
            ["0", "0.4", "10", "1234"]
        );
    }

    #[test]
    fn spans() {
        for (milliseconds, text) in [
            (0, "0ms"),
            (999, "999ms"),
            (4_250, "4.2s"),
            (59_999, "59s"),
            (192_000, "3m12s"),
            (18_420_000, "5h07m"),
            (1_047_600_000, "12d03h"),
        ] {
            assert_eq!(span(milliseconds), text);
        }
    }
}
