//! How long things took, in fixed buckets: one histogram per worker thread, written by that thread only.
//!
//! Owns: the buckets. Must not know: what is timed.

use std::ops::AddAssign;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::counters::Counter;

/// The upper bounds of the buckets; what takes longer goes into one more. A local service answers within
/// the first, a proxy's header comes with the round trip to it, and the usual time-outs are 5 s.
pub const BOUNDS: [Duration; 14] = [
    Duration::from_micros(100),
    Duration::from_micros(250),
    Duration::from_micros(500),
    Duration::from_millis(1),
    Duration::from_micros(2500),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_secs(1),
    Duration::from_millis(2500),
    Duration::from_secs(5),
];

const BUCKETS: usize = BOUNDS.len() + 1;

/// Counts by duration, with one writer.
#[derive(Debug, Default)]
pub struct Histogram {
    counts: [Counter; BUCKETS],
    /// Nanoseconds.
    sum: Counter,
}

impl Histogram {
    /// Counts one duration; for the owning thread only.
    pub(super) fn observe(&self, took: Duration) {
        let bucket = BOUNDS.partition_point(|bound| *bound < took);
        self.counts[bucket].add(1);
        // five centuries fit
        self.sum.add(took.as_nanos() as u64);
    }

    /// What has been counted so far.
    pub fn read(&self) -> Distribution {
        Distribution {
            counts: std::array::from_fn(|at| self.counts[at].get()),
            sum_ns: self.sum.get(),
        }
    }
}

/// A reading of a [`Histogram`], of one worker or summed over several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Distribution {
    /// How many fell into each bucket, not cumulated; the last has no bound.
    pub counts: [u64; BUCKETS],
    /// All durations together, in nanoseconds.
    pub sum_ns: u64,
}

impl Distribution {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

impl AddAssign for Distribution {
    fn add_assign(&mut self, other: Self) {
        for (sum, more) in self.counts.iter_mut().zip(other.counts) {
            *sum += more;
        }
        self.sum_ns += other.sum_ns;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        assert!(BOUNDS.is_sorted());
        let histogram = Histogram::default();
        for took in [
            Duration::ZERO,
            BOUNDS[0],
            BOUNDS[0] + Duration::from_nanos(1),
            BOUNDS[13],
            Duration::from_secs(3600),
        ] {
            histogram.observe(took);
        }
        let mut read = histogram.read();
        assert_eq!((read.counts[0], read.counts[1]), (2, 1));
        assert_eq!((read.counts[13], read.counts[14]), (1, 1));
        assert_eq!(read.sum_ns, 3_605_000_200_001);
        read += read;
        assert_eq!(read.count(), 10);
    }
}
