//! What must change in the mangle tables of iptables. Pure, as `plan.rs`.
//!
//! Order matters in OUTPUT: every save of ours stands before every restore of ours, of all pathways
//! together, or a packet that carries one pathway's mark on a connection that remembers another's
//! would lose its own. Ours stand at the top: programs that route by mark (VPN clients, transparent
//! proxies) like to end the chain early for packets that are not theirs.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{Family, Mark, Pathway};

use crate::pathway::piece::{Chain, Job, Line, LineStep, Made, Program, Step};
use crate::pathway::plan::{Change, Goal, Outcome};

use super::ruleset::{Connmark, Ruleset};

/// Inserts and deletions, in order; those of one program follow each other.
pub(crate) fn changes(
    goal: Goal,
    pathways: &[Pathway],
    wanted: &BTreeSet<Line>,
    rulesets: &[Ruleset],
) -> Vec<Change> {
    let marks: BTreeMap<u32, Mark> = pathways
        .iter()
        .map(|pathway| (pathway.mark.get(), pathway.mark))
        .collect();
    let mut changes = Vec::new();
    let mut families = BTreeSet::new();
    for ruleset in rulesets {
        // the other variant's table, where a line of ours may still stand from before a switch
        let writes = families.insert(ruleset.family);
        let mut dropped = Vec::new();
        for chain in Chain::ALL {
            let wanted = wanted
                .iter()
                .filter(|line| writes && line.family == ruleset.family && line.chain == chain)
                .copied()
                .collect();
            let (steps, drop) = in_chain(goal, &marks, wanted, ruleset, chain);
            changes.extend(steps);
            dropped.extend(drop);
        }
        changes.extend(drops(ruleset, &dropped));
    }
    changes
}

/// The chains that end empty and were made for our lines, and with the last of them the table.
fn drops(ruleset: &Ruleset, chains: &[(Chain, Mark)]) -> Vec<Change> {
    let change = |mark, command| Change {
        mark,
        outcome: Outcome::Removed,
        leftover: false,
        command,
    };
    let mut changes: Vec<_> = chains
        .iter()
        .map(|&(chain, mark)| {
            let step = Step::DropChain {
                program: ruleset.program.clone(),
                family: ruleset.family,
                chain,
            };
            change(mark, step)
        })
        .collect();
    let gone = |chain: Chain| {
        ruleset.absent.chains.contains(&chain) || chains.iter().any(|(gone, _)| *gone == chain)
    };
    if let Some((_, mark)) = chains.last()
        && ruleset.remembers_table()
        && !ruleset.elsewhere
        && Chain::ALL.into_iter().all(gone)
    {
        let family = ruleset.family;
        changes.push(change(*mark, Step::DropTable { family }));
    }
    changes
}

/// Whether the line is the scripts': theirs save in PREROUTING and restore in OUTPUT, with whole marks and no tag.
fn left_by_scripts(chain: Chain, line: &Connmark) -> bool {
    matches!(
        (chain, line.job),
        (Chain::Prerouting, Job::Save) | (Chain::Output, Job::Restore)
    ) && line.mask == u32::MAX
        && line.copied == u32::MAX
        && line.comment.is_none()
}

fn in_chain(
    goal: Goal,
    marks: &BTreeMap<u32, Mark>,
    wanted: Vec<Line>,
    ruleset: &Ruleset,
    chain: Chain,
) -> (Vec<Change>, Option<(Chain, Mark)>) {
    let found = ruleset.chain(chain);
    let makes = ruleset.makes(chain);
    let by_mark: BTreeMap<(Mark, Job), Line> = wanted
        .iter()
        .map(|line| ((line.mark, line.job), *line))
        .collect();
    // last to first, because a deletion takes the first of two lines that are the same
    let mut missing: BTreeSet<Line> = wanted.into_iter().collect();
    let mut last_save = None;
    let mut stale = Vec::new();
    for (index, line) in found.iter().enumerate().rev() {
        let Some(connmark) = &line.connmark else {
            continue;
        };
        if connmark.tag().is_some() && connmark.job == Job::Save {
            last_save = last_save.max(Some(index));
        }
        let leftover = left_by_scripts(chain, connmark);
        let tag = if leftover {
            Some(connmark.mark)
        } else {
            connmark.tag()
        };
        let Some(&mark) = tag.and_then(|tag| marks.get(&tag)) else {
            continue;
        };
        if let Some(line) = by_mark.get(&(mark, connmark.job))
            && connmark.is(line)
            && (line.job == Job::Save || Some(index) > last_save)
            && missing.remove(line)
        {
            continue;
        }
        stale.push((mark, leftover, line));
    }
    stale.reverse();

    let mut steps = Steps {
        program: &ruleset.program,
        family: ruleset.family,
        made: makes,
        chain,
        working: found.iter().map(|line| line.words.clone()).collect(),
    };
    let (saves, restores): (Vec<_>, Vec<_>) =
        missing.into_iter().partition(|line| line.job == Job::Save);
    let below_saves = last_save.map_or(0, |index| index + 1) + saves.len();
    let inserts = saves.into_iter().enumerate().chain(
        restores
            .into_iter()
            .enumerate()
            .map(|(index, line)| (below_saves + index, line)),
    );
    let mut changes: Vec<_> = inserts
        .map(|(index, line)| Change {
            mark: line.mark,
            outcome: Outcome::Added,
            leftover: false,
            command: steps.insert(index, line.words(makes)),
        })
        .collect();
    for (mark, leftover, line) in stale {
        changes.push(Change {
            mark,
            outcome: match goal {
                Goal::Add if leftover => Outcome::Replaced,
                _ => Outcome::Removed,
            },
            leftover,
            command: steps.delete(&line.words),
        });
    }
    let last = changes.last().map(|change| (chain, change.mark));
    let drop = last.filter(|_| steps.working.is_empty() && makes.is_some());
    (changes, drop)
}

/// The chain as it will be at each step.
struct Steps<'a> {
    program: &'a Program,
    family: Family,
    made: Option<Made>,
    chain: Chain,
    working: Vec<String>,
}

impl Steps<'_> {
    fn step(&self, index: usize, words: String) -> LineStep {
        LineStep {
            program: self.program.clone(),
            chain: self.chain,
            position: index + 1,
            words,
            family: self.family,
            made: self.made,
        }
    }

    fn insert(&mut self, index: usize, words: String) -> Step {
        self.working.insert(index, words.clone());
        Step::InsertLine(self.step(index, words))
    }

    fn delete(&mut self, words: &str) -> Step {
        let index = self.working.iter().position(|line| line == words);
        if let Some(index) = index {
            self.working.remove(index);
        }
        Step::DelLine(self.step(index.unwrap_or_default(), words.to_owned()))
    }
}
