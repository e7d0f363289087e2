//! How long to wait before the next try: pure but for the jitter.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// After the first failure.
const FIRST: Duration = Duration::from_millis(500);
/// The longest pause: soon enough after somebody mended it.
const LONGEST: Duration = Duration::from_secs(60);
/// By how much of itself a pause is longer or shorter, so that many do not try in the same instant.
const JITTER: f64 = 0.25;

/// Doubles with every failure.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The pause after one more failure.
    pub(super) fn next(&mut self) -> Duration {
        let pause = self.pause(random());
        self.failures = self.failures.saturating_add(1);
        pause
    }

    /// `random` is in 0..=1.
    fn pause(&self, random: f64) -> Duration {
        // beyond 2^16 times the first it is the longest anyway
        let exact = (FIRST * (1 << self.failures.min(16))).min(LONGEST);
        exact.mul_f64(1.0 - JITTER + 2.0 * JITTER * random)
    }
}

/// Evenly spread over 0..=1; the standard library's hash keys are its only source of randomness.
fn random() -> f64 {
    let number = u32::try_from(RandomState::new().hash_one(0) >> 32).unwrap_or(u32::MAX);
    f64::from(number) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let at = |failures| Backoff { failures }.pause(0.5);
        assert_eq!(at(0), Duration::from_millis(500));
        assert_eq!(at(1), Duration::from_secs(1));
        assert_eq!(at(6), Duration::from_secs(32));
        assert_eq!(at(7), Duration::from_secs(60));
        assert_eq!(at(u32::MAX), Duration::from_secs(60));
    }

    #[test]
    fn jitter_stays_within_a_quarter() {
        let backoff = Backoff { failures: 7 };
        assert_eq!(backoff.pause(0.0), Duration::from_secs(45));
        assert_eq!(backoff.pause(1.0), Duration::from_secs(75));
        for _ in 0..1000 {
            assert!((0.0..=1.0).contains(&random()));
        }
    }
}
