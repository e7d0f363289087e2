//! Counts per second, from samples that are a few seconds old.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::relay::counters::Totals;

/// A span that is shorter says more about chance than about the rate.
const SHORTEST: Duration = Duration::from_secs(2);

/// What happens per second.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Rates {
    /// Connections accepted.
    pub connections: f64,
    /// Bytes handed to the service.
    pub bytes_to_target: f64,
    /// Bytes handed to clients.
    pub bytes_to_client: f64,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    accepted: u64,
    bytes_to_target: u64,
    bytes_to_client: u64,
}

impl Sample {
    fn new(at: Instant, totals: &Totals) -> Self {
        Self {
            at,
            accepted: totals.accepted,
            bytes_to_target: totals.bytes_to_target,
            bytes_to_client: totals.bytes_to_client,
        }
    }

    /// From an earlier sample to this one.
    fn since(&self, earlier: &Self) -> Rates {
        let seconds = self.at.duration_since(earlier.at).as_secs_f64();
        // a relay that was started anew counts from 0 again
        let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
        Rates {
            connections: rate(self.accepted, earlier.accepted),
            bytes_to_target: rate(self.bytes_to_target, earlier.bytes_to_target),
            bytes_to_client: rate(self.bytes_to_client, earlier.bytes_to_client),
        }
    }
}

/// The last two samples of each instance.
#[derive(Debug, Default)]
pub(super) struct Sampler(RefCell<HashMap<String, [Sample; 2]>>);

impl Sampler {
    /// Takes a sample of every instance there is, and forgets the others.
    pub(super) fn sample<'n>(&self, at: Instant, all: impl Iterator<Item = (&'n str, Totals)>) {
        let mut samples = self.0.borrow_mut();
        let mut before = std::mem::take(&mut *samples);
        *samples = all
            .map(|(name, totals)| {
                let now = Sample::new(at, &totals);
                let last = before.remove(name).map_or(now, |[_, last]| last);
                (name.to_owned(), [last, now])
            })
            .collect();
    }

    /// What happens per second, over the youngest span that is long enough; zeros while there is none.
    pub(super) fn rates(&self, name: &str, at: Instant, totals: &Totals) -> Rates {
        let samples = self.0.borrow();
        let now = Sample::new(at, totals);
        samples
            .get(name)
            .into_iter()
            .flat_map(|[older, newer]| [newer, older])
            .find(|sample| at.duration_since(sample.at) >= SHORTEST)
            .map_or_else(Rates::default, |sample| now.since(sample))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(accepted: u64, bytes_to_target: u64) -> Totals {
        Totals {
            accepted,
            bytes_to_target,
            ..Totals::default()
        }
    }

    #[test]
    fn rates_are_over_seconds_not_over_chance() {
        let sampler = Sampler::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(sampler.rates("a", start, &totals(9, 9)), Rates::default());
        sampler.sample(at(0), [("a", totals(0, 0))].into_iter());
        sampler.sample(at(5), [("a", totals(50, 5000))].into_iter());
        // a second after the last sample the one before counts
        let rates = sampler.rates("a", at(6), &totals(60, 6000));
        assert_eq!((rates.connections, rates.bytes_to_target), (10.0, 1000.0));
        let rates = sampler.rates("a", at(10), &totals(50, 5000));
        assert_eq!(rates, Rates::default());
        // started anew
        assert_eq!(sampler.rates("a", at(10), &totals(3, 3)), Rates::default());
        sampler.sample(at(10), [("b", totals(0, 0))].into_iter());
        assert_eq!(sampler.rates("a", at(20), &totals(99, 9)), Rates::default());
    }
}
