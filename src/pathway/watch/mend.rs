//! Doing what can be done, and saying what was.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use tracing::{debug, info, warn};

use super::pieces::Piece;
use super::{Keeper, Round};
use crate::causes::with_causes;
use crate::model::{Mark, Pathway};
use crate::pathway::firewall::{self, same_transaction};
use crate::pathway::piece::Step;
use crate::pathway::plan::{Change, Conflict, Outcome, Plan};

/// So many pieces are named in a line of the log; -v has all of them.
const NAMED: usize = 4;

impl Keeper {
    /// What there is to do now; what forbids it goes to `failures`.
    pub(super) fn planned(&self, failures: &mut BTreeSet<String>) -> Plan {
        let now = Instant::now();
        let plan = self.plan_for(&self.pathways, &self.reading.facts);
        failures.extend(plan.conflicts.iter().map(ToString::to_string));
        let taken: BTreeSet<Mark> = plan.conflicts.iter().map(Conflict::mark).collect();
        let free = |pathway: &&Pathway| {
            !taken.contains(&pathway.mark) && !self.storms.holds(pathway.mark, now)
        };
        let now: Vec<Pathway> = self.pathways.iter().filter(free).cloned().collect();
        if now.len() == self.pathways.len() {
            return plan;
        }
        self.plan_for(&now, &self.reading.facts)
    }

    /// As much as can be done: a piece that fails does not keep the others, but nothing is taken away
    /// then.
    pub(super) async fn apply(&self, changes: Vec<Change>, round: &mut Round) {
        let steps: Vec<Step> = changes
            .iter()
            .map(|change| change.command.clone())
            .collect();
        let mut changes = changes.into_iter();
        let mut last = None::<&Step>;
        for batch in steps.chunk_by(same_transaction) {
            if last.is_some_and(|last| firewall::is_switch(last, &batch[0])) {
                firewall::settle();
            }
            last = batch.last();
            let of: Vec<Change> = changes.by_ref().take(batch.len()).collect();
            let makes =
                |change: &Change| matches!(change.outcome, Outcome::Added | Outcome::Adopted);
            if !round.failures.is_empty() && !of.iter().any(makes) {
                continue;
            }
            match self.host.run(batch).await {
                Ok(()) => round.applied.extend(of),
                Err(error) if error.is_network_down() => {
                    round
                        .failures
                        .insert("lo is down, and routes need it".to_owned());
                }
                Err(error) => _ = round.failures.insert(with_causes(&error)),
            }
        }
    }

    /// Counts what was put back, and says so.
    pub(super) fn settle(&mut self, applied: &[Change]) {
        let mended = self.losses.made(applied.iter().filter_map(Piece::made_by));
        let mut groups = BTreeMap::<(Mark, String), (Instant, Vec<&Piece>)>::new();
        for (piece, loss) in &mended.repaired {
            self.repairs.count(piece.mark, piece.kind);
            debug!(mark = %piece.mark, by = %loss.who, lost = piece.text, "repaired");
            let group = (piece.mark, loss.who.to_string());
            let entry = groups.entry(group).or_insert((loss.since, Vec::new()));
            entry.0 = entry.0.min(loss.since);
            entry.1.push(piece);
        }
        for ((mark, by), (since, pieces)) in groups {
            let after = since.elapsed();
            warn!(%mark, by, lost = %named(&pieces), ?after, "repaired");
        }
        if !mended.completed.is_empty() {
            let pieces: Vec<&Piece> = mended.completed.iter().collect();
            info!(pieces = pieces.len(), made = %named(&pieces), "completed");
        }
        let mut others = BTreeMap::<Outcome, Vec<String>>::new();
        for change in applied
            .iter()
            .filter(|change| change.outcome != Outcome::Added)
        {
            let of = others.entry(change.outcome).or_default();
            of.push(change.command.to_string());
        }
        for (outcome, commands) in others {
            info!(changes = commands.len(), done = %some_of(&commands), "{outcome}");
        }
        self.publish();
    }
}

/// The pieces of one line.
pub(super) fn named(pieces: &[&Piece]) -> String {
    let texts: Vec<&str> = pieces.iter().map(|piece| piece.text.as_str()).collect();
    some_of(&texts)
}

fn some_of(texts: &[impl AsRef<str>]) -> String {
    let first: Vec<&str> = texts.iter().take(NAMED).map(AsRef::as_ref).collect();
    let mut text = first.join("; ");
    let more = texts.len().saturating_sub(NAMED);
    if more > 0 {
        text.push_str(&format!("; and {more} more"));
    }
    text
}
