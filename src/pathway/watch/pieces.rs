//! Which pieces are lost, since when and by whom, and which were put back. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::culprit::{Culprits, Who};
use crate::model::Mark;
use crate::pathway::piece::Step;
use crate::pathway::plan::{Change, Outcome, Plan};
use crate::pathway::{Finding, Firewall, Problem};

/// What kind of thing a piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An ip rule.
    Rule,
    /// A route.
    Route,
    /// What the firewall holds.
    Firewall,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Rule, Self::Route, Self::Firewall];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rule => "rule",
            Self::Route => "route",
            Self::Firewall => "firewall",
        }
    }

    pub(super) fn of(step: &Step) -> Self {
        match step {
            Step::AddRule(_) | Step::DelRule(_) => Self::Rule,
            Step::AddRoute(_) | Step::DelRoute(_) | Step::AdoptRoute { .. } => Self::Route,
            _ => Self::Firewall,
        }
    }
}

/// A piece by what it is called; where it stands may change.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Piece {
    pub(super) mark: Mark,
    pub(super) kind: Kind,
    pub(super) text: String,
}

impl Piece {
    /// The piece that a change would make.
    pub(super) fn made_by(change: &Change) -> Option<Self> {
        (change.outcome == Outcome::Added).then(|| Self {
            mark: change.mark,
            kind: Kind::of(&change.command),
            text: text(change),
        })
    }
}

/// "IPv4 rule priority 100 from …": as a finding says it, without that it is missing.
fn text(change: &Change) -> String {
    let finding = Finding {
        mark: change.mark,
        firewall: Firewall::Auto,
        problem: Problem::Missing(change.command.clone()),
    };
    finding.to_string().replacen(" missing: ", " ", 1)
}

/// The pieces that a plan would make, with the step that makes each.
pub(super) fn missing(plan: &Plan) -> BTreeMap<Piece, &Step> {
    let made = |change| Some((Piece::made_by(change)?, &change.command));
    plan.changes.iter().filter_map(made).collect()
}

/// A piece that was there and is not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Loss {
    pub(super) who: Who,
    pub(super) since: Instant,
}

/// What is missing: lost, or never there.
#[derive(Debug, Default)]
pub(super) struct Losses {
    lost: BTreeMap<Piece, Loss>,
    never: BTreeSet<Piece>,
}

/// What a repair came to.
#[derive(Debug, Default)]
pub(super) struct Mended {
    /// Put back.
    pub(super) repaired: BTreeMap<Piece, Loss>,
    /// Made for the first time.
    pub(super) completed: BTreeSet<Piece>,
}

impl Losses {
    /// Takes note of what is missing now. `before` is what would be missing by what was wanted until
    /// now: of that, whatever was there is lost; the rest is newly wanted. Returns what is newly lost.
    pub(super) fn update(
        &mut self,
        now: &BTreeMap<Piece, &Step>,
        before: &BTreeMap<Piece, &Step>,
        culprits: &Culprits,
        since: Instant,
    ) -> Vec<Piece> {
        self.lost.retain(|piece, _| now.contains_key(piece));
        self.never.retain(|piece| now.contains_key(piece));
        let mut newly = Vec::new();
        for (piece, step) in now {
            if self.lost.contains_key(piece) || self.never.contains(piece) {
                continue;
            }
            if before.contains_key(piece) {
                let who = culprits.of(step);
                self.lost.insert(piece.clone(), Loss { who, since });
                newly.push(piece.clone());
            } else {
                self.never.insert(piece.clone());
            }
        }
        newly
    }

    /// These pieces were made, and are there.
    pub(super) fn made(&mut self, pieces: impl IntoIterator<Item = Piece>) -> Mended {
        let mut mended = Mended::default();
        for piece in pieces {
            if let Some(loss) = self.lost.remove(&piece) {
                mended.repaired.insert(piece, loss);
            } else if self.never.remove(&piece) {
                mended.completed.insert(piece);
            }
        }
        mended
    }

    /// Who is said to have taken this piece.
    pub(super) fn who(&self, piece: &Piece) -> Who {
        let loss = self.lost.get(piece);
        loss.map(|loss| loss.who.clone()).unwrap_or_default()
    }

    /// Everything was seen to be in place: whatever is missing from here on is lost.
    pub(super) fn none(&mut self) {
        self.lost.clear();
        self.never.clear();
    }

    /// How many pieces are missing.
    pub(super) fn len(&self) -> usize {
        self.lost.len() + self.never.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Family;
    use crate::pathway::piece::{PROTOCOL, Route};

    fn step(table: u32) -> Step {
        Step::AddRoute(Route {
            family: Family::V4,
            table,
            protocol: PROTOCOL,
        })
    }

    fn piece(table: u32) -> Piece {
        let change = Change {
            mark: Mark::new(table).unwrap(),
            outcome: Outcome::Added,
            leftover: false,
            command: step(table),
        };
        Piece::made_by(&change).unwrap()
    }

    #[test]
    fn what_was_there_is_lost_and_what_is_newly_wanted_is_not() {
        let steps = [step(1), step(2)];
        let both = BTreeMap::from([(piece(1), &steps[0]), (piece(2), &steps[1])]);
        let old = BTreeMap::from([(piece(1), &steps[0])]);
        let mut culprits = Culprits::default();
        culprits.route(Family::V4, 1, Who::Kernel);
        let (mut losses, at) = (Losses::default(), Instant::now());
        assert_eq!(losses.update(&both, &old, &culprits, at), [piece(1)]);
        // the same is not lost twice, nor is what was never there
        assert!(losses.update(&both, &both, &culprits, at).is_empty());
        assert_eq!((losses.len(), losses.who(&piece(1))), (2, Who::Kernel));
        let mended = losses.made([piece(1), piece(2)]);
        assert_eq!(mended.repaired.into_keys().collect::<Vec<_>>(), [piece(1)]);
        assert_eq!(mended.completed, BTreeSet::from([piece(2)]));
        assert_eq!(losses.update(&both, &both, &culprits, at).len(), 2);
        // and what another program put back needs nobody
        assert!(losses.update(&old, &old, &culprits, at).is_empty());
        assert_eq!(losses.len(), 1);
    }
}
