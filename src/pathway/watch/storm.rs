//! When something takes the same piece away again and again: how long its pathway is left alone. Pure.
//!
//! Every piece has a bucket that fills with its losses and leaks steadily: a burst, such as a firewall
//! that restarts three times, is no storm. Once it is one, the pauses double.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use super::pieces::Piece;
use crate::model::Mark;

/// So many losses of one piece at a time are none.
const BURST: f64 = 10.0;
/// And so many more for each second.
const PER_SECOND: f64 = 1.0;
/// The first pause.
const FIRST: Duration = Duration::from_millis(250);
/// The longest: its end is what tells that the storm is over.
const LONGEST: Duration = Duration::from_secs(30);
/// How long a pathway must have been whole, at least, for its storm to be over.
const CALM: Duration = Duration::from_secs(10);

/// Losses of one piece.
#[derive(Debug)]
struct Bucket {
    level: f64,
    at: Instant,
}

/// A storm over one pathway.
#[derive(Debug)]
struct Storm {
    pause: Duration,
    until: Instant,
    /// Whether the pathway is left alone until then, or was already seen to.
    waiting: bool,
    losses: u64,
}

/// A storm that begins or grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gust {
    /// Until the next repair.
    pub(super) pause: Duration,
    /// Repairs since the storm began.
    pub(super) losses: u64,
}

/// Every pathway's.
#[derive(Debug, Default)]
pub(super) struct Storms {
    buckets: HashMap<Piece, Bucket>,
    storms: BTreeMap<Mark, Storm>,
}

impl Storms {
    /// These pieces of one pathway were lost together.
    pub(super) fn lost(&mut self, mark: Mark, pieces: &[&Piece], now: Instant) -> Option<Gust> {
        self.buckets.retain(|_, bucket| bucket.leaked(now) > 0.0);
        let mut full = false;
        for piece in pieces {
            let bucket = self.buckets.entry((*piece).clone()).or_insert(Bucket {
                level: 0.0,
                at: now,
            });
            bucket.level = bucket.leaked(now) + 1.0;
            bucket.at = now;
            full |= bucket.level > BURST;
        }
        let storm = match self.storms.get_mut(&mark) {
            Some(storm) => {
                storm.pause = (storm.pause * 2).min(LONGEST);
                storm
            }
            None if full => self.storms.entry(mark).or_insert(Storm {
                pause: FIRST,
                until: now,
                waiting: false,
                losses: 0,
            }),
            None => return None,
        };
        storm.losses += 1;
        storm.until = now + storm.pause;
        storm.waiting = true;
        Some(Gust {
            pause: storm.pause,
            losses: storm.losses,
        })
    }

    /// Whether the pathway is to be left alone.
    pub(super) fn holds(&self, mark: Mark, now: Instant) -> bool {
        self.storms
            .get(&mark)
            .is_some_and(|storm| storm.until > now)
    }

    /// When the next pathway that is left alone is to be seen to.
    pub(super) fn next(&self) -> Option<Instant> {
        let waiting = self.storms.values().filter(|storm| storm.waiting);
        waiting.map(|storm| storm.until).min()
    }

    /// The pathways whose pause is over are being seen to.
    pub(super) fn release(&mut self, now: Instant) {
        for storm in self.storms.values_mut() {
            storm.waiting &= storm.until > now;
        }
    }

    /// Ends the storms over pathways that have been whole for long enough, and names them.
    pub(super) fn calmed(&mut self, now: Instant) -> Vec<Mark> {
        let over = |storm: &Storm| now >= storm.until + CALM.max(storm.pause * 2);
        let calm: Vec<Mark> = self
            .storms
            .iter()
            .filter(|(_, storm)| over(storm))
            .map(|(mark, _)| *mark)
            .collect();
        for mark in &calm {
            self.storms.remove(mark);
            self.buckets.retain(|piece, _| piece.mark != *mark);
        }
        calm
    }
}

impl Bucket {
    fn leaked(&self, now: Instant) -> f64 {
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        (self.level - seconds * PER_SECOND).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::pieces::Kind;
    use super::*;

    fn mark(number: u32) -> Mark {
        Mark::new(number).unwrap()
    }

    fn piece(number: u32, text: &str) -> Piece {
        Piece {
            mark: mark(number),
            kind: Kind::Rule,
            text: text.to_owned(),
        }
    }

    #[test]
    fn a_burst_and_steady_losses_of_many_pieces_are_no_storm() {
        let mut storms = Storms::default();
        let mut now = Instant::now();
        for _ in 0..10 {
            assert_eq!(storms.lost(mark(1), &[&piece(1, "a")], now), None);
        }
        // twenty a second, spread over thirty pieces
        for number in 0..1000 {
            now += Duration::from_millis(50);
            let lost = piece(2, &format!("{}", number % 30));
            assert_eq!(storms.lost(mark(2), &[&lost], now), None, "{number}");
        }
        assert_eq!(storms.next(), None);
    }

    #[test]
    fn pauses_double_while_it_blows_and_end_when_it_is_calm() {
        let mut storms = Storms::default();
        let mut now = Instant::now();
        let lost = piece(1, "a");
        for _ in 0..10 {
            storms.lost(mark(1), &[&lost], now);
        }
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let gust = storms.lost(mark(1), &[&lost], now).unwrap();
            assert!(storms.holds(mark(1), now));
            assert!(!storms.holds(mark(2), now));
            assert_eq!(storms.next(), Some(now + gust.pause));
            storms.release(now);
            now += gust.pause;
            // over, and not seen to yet
            assert_eq!(storms.next(), Some(now));
            assert!(!storms.holds(mark(1), now));
            storms.release(now);
            assert_eq!(storms.next(), None);
            pauses.push(gust.pause.as_millis());
        }
        assert_eq!(
            pauses,
            [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]
        );
        assert!(storms.calmed(now + Duration::from_secs(59)).is_empty());
        assert_eq!(storms.calmed(now + Duration::from_secs(60)), [mark(1)]);
        assert_eq!(storms.lost(mark(1), &[&lost], now), None);
    }
}
