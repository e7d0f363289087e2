//! What must change in `table inet mmproxy`. Pure, as `plan.rs`.
//!
//! The table's rules are replaced as a whole, and a change of it is reported for each pathway that it
//! concerns: all of these changes are one transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::model::{Mark, Pathway};
use crate::pathway::piece::{EntriesStep, Line, Step, Swap};
use crate::pathway::plan::{Change, Outcome};

use super::table::{Entry, Layout, Table};

/// The way from the table as found to one that holds just what is wanted of these pathways, and of
/// others what it holds. Whole replacement, so also the way out of any disorder in it.
pub(crate) fn changes(
    pathways: &[Pathway],
    wanted: &BTreeSet<Line>,
    found: Option<&Table>,
) -> Vec<Change> {
    let nothing = BTreeSet::new();
    let (entries, awake, exact, stays) = match found {
        None => (&nothing, true, true, Some(Layout::default())),
        Some(Table::Ours {
            entries,
            awake,
            exact,
            stays,
        }) => (entries, *awake, *exact, stays.clone()),
        Some(Table::Foreign | Table::Unreadable) => return Vec::new(),
    };
    let marks: BTreeSet<Mark> = pathways.iter().map(|pathway| pathway.mark).collect();
    let others = entries.iter().filter(|entry| !marks.contains(&entry.mark));
    let wanted = wanted.iter().map(Entry::from);
    let after: BTreeSet<Entry> = others.copied().chain(wanted).collect();
    let before = if awake { entries.clone() } else { nothing };
    if after == before && exact {
        return Vec::new();
    }
    let mut steps = BTreeMap::<(Outcome, Mark), Vec<Entry>>::new();
    for entry in after.difference(&before) {
        let of = steps.entry((Outcome::Added, entry.mark)).or_default();
        of.push(*entry);
    }
    for entry in before.difference(&after) {
        let of = steps.entry((Outcome::Removed, entry.mark)).or_default();
        of.push(*entry);
    }
    if steps.is_empty() {
        // all entries work, and something stands between them that does not belong there
        let Some(first) = pathways.first() else {
            return Vec::new();
        };
        steps.insert((Outcome::Removed, first.mark), Vec::new());
    }
    let swap = Arc::new(Swap {
        before,
        after,
        stays,
    });
    let step = |(index, ((outcome, mark), entries))| Change {
        mark,
        outcome,
        leftover: false,
        command: Step::Entries(EntriesStep {
            mark,
            entries,
            swap: Arc::clone(&swap),
            back: false,
            first: index == 0,
        }),
    };
    steps.into_iter().enumerate().map(step).collect()
}
