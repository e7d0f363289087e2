//! `pathway list`: what the kernel has of each pathway, and who keeps it.

use std::io::Write;

use serde::Serialize;

use crate::commands::output::{print_json, results, table, trimmed};
use crate::model::{Mark, Pathway};
use crate::pathway::in_use::why_kept;
use crate::pathway::watch::repairs::{Counts, Repairs};
use crate::pathway::{Listed, State};

/// Says who puts back what was just removed.
pub(super) fn warn_of_keepers(pathways: &[Pathway], kept: &[Repairs]) {
    for repairs in kept {
        let of_it = |pathway: &&Pathway| repairs.pathways.contains_key(&pathway.mark.get());
        for pathway in pathways.iter().filter(of_it) {
            eprintln!(
                "note: pid {} keeps the pathway of mark {} and puts it back: stop that process, or take the \
                 mark out of the files",
                repairs.pid, pathway.mark
            );
        }
    }
}

/// A pathway, and who keeps it.
#[derive(Serialize)]
struct ListedJson<'l> {
    #[serde(flatten)]
    listed: &'l Listed,
    /// The processes that keep it (`pathway watch`, `run --manage-pathways`).
    kept_by: Vec<u32>,
    /// What they have put back.
    repairs: Counts,
}

impl<'l> ListedJson<'l> {
    fn new(listed: &'l Listed, kept: &[Repairs]) -> Self {
        let mut new = Self {
            listed,
            kept_by: Vec::new(),
            repairs: Counts::default(),
        };
        for repairs in kept {
            let mark = listed.mark.map(Mark::get);
            if let Some(counts) = mark.and_then(|mark| repairs.pathways.get(&mark)) {
                new.kept_by.push(repairs.pid);
                new.repairs += *counts;
            }
        }
        new
    }

    fn kept(&self) -> String {
        let pids: Vec<String> = self.kept_by.iter().map(u32::to_string).collect();
        match pids.as_slice() {
            [] => "-".to_owned(),
            pids => format!(
                "by pid {}, {} repairs",
                pids.join(" "),
                self.repairs.total()
            ),
        }
    }
}

/// Shows pathways with who keeps them.
pub(super) fn show(listed: &[Listed], kept: &[Repairs], json: bool) -> anyhow::Result<()> {
    let listed: Vec<_> = listed
        .iter()
        .map(|one| ListedJson::new(one, kept))
        .collect();
    if json {
        return print_json(&listed);
    }
    let mut table = table(["MARK", "NAME", "TABLE", "STATE", "PIECES", "KEPT"]);
    for with_keeper in &listed {
        let entry = with_keeper.listed;
        let or_unknown = |value: Option<String>| value.unwrap_or_else(|| "?".to_owned());
        let pieces = match entry.state {
            State::NotConfigured | State::Leaving => "-".to_owned(),
            _ => format!(
                "{} of {}",
                entry.wanted.saturating_sub(entry.missing.len()),
                entry.wanted
            ),
        };
        table.add_row(vec![
            or_unknown(entry.mark.map(|mark| mark.to_string())),
            entry.name.clone().unwrap_or_else(|| "-".to_owned()),
            or_unknown(entry.table.map(|table| table.to_string())),
            entry.state.to_string(),
            pieces,
            with_keeper.kept(),
        ]);
    }
    let mut out = results();
    writeln!(out, "{}", trimmed(&table))?;
    for one in listed.iter().map(|one| one.listed) {
        if let (Some(mark), Some(ways)) = (one.mark, &one.still_used) {
            writeln!(out, "{}", why_kept(mark, ways))?;
        }
    }
    Ok(())
}
