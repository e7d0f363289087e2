//! Who gives replies their mark: the choice of a back end, and what the back ends hold.
//!
//! | file | owns |
//! |---|---|
//! | [`iptables`] | the programs of iptables, either variant; [`ruleset`] what they print, [`lines`] the plan |
//! | `residue` | what iptables-nft leaves behind |
//! | `program` | finding and running a program |
//!
//! Must not know: rules and routes, how a report is shown.

pub mod iptables;
pub(crate) mod lines;
mod program;
mod residue;
pub mod ruleset;

use std::io;

use crate::model::{Family, Pathway};

use super::piece::{Chain, Step};
use super::plan::{Change, Goal, Wanted};
use iptables::Iptables;
use ruleset::Ruleset;

/// What a person chose (`--firewall`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Firewall {
    /// What holds lines of ours, else iptables where it is installed
    #[default]
    Auto,
    /// iptables and ip6tables, of either variant
    Iptables,
}

/// What lines are written with, once that is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Lines in the mangle tables.
    Iptables,
}

/// Why the firewall could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No binary of that name.
    #[error("{program} is not installed: the CONNMARK rules need it (package {package})")]
    Missing {
        /// The name.
        program: &'static str,
        /// The package that has it.
        package: &'static str,
    },
    /// It could not be started or talked to.
    #[error("cannot run {program}")]
    Run {
        /// The name.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It ran and failed.
    #[error("{program} failed ({status}): {said}")]
    Failed {
        /// The name.
        program: String,
        /// How it ended.
        status: String,
        /// What it said, and the line that it stopped at.
        said: String,
    },
    /// nf_tables could not be asked.
    #[error("cannot read the {family} mangle table of nf_tables")]
    Tables {
        /// The family.
        family: Family,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A back end: reads what it holds, and makes steps of its own in as few transactions as it can.
///
/// What is to be done is planned without it, by a pure function beside it.
pub(crate) trait Driver {
    /// What it holds.
    type Found;

    /// Reads what is there. Changes nothing.
    async fn read(&self) -> Result<Self::Found, Error>;

    /// Makes these steps, which are all this back end's: all or none.
    async fn write(&self, steps: &[Step]) -> Result<(), Error>;
}

/// What the back ends hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// Mangle tables; the first of a family is the one that lines are added to.
    pub iptables: Vec<Ruleset>,
}

impl Found {
    /// The marks in the tags of what is ours.
    pub(crate) fn marks(&self) -> impl Iterator<Item = u32> {
        let lines = self.iptables.iter().flat_map(Ruleset::lines);
        lines.filter_map(|(_, line)| line.connmark.as_ref()?.tag())
    }
}

/// The back ends that are installed, and which of them is wanted.
#[derive(Debug)]
pub(crate) struct Firewalls {
    iptables: Iptables,
}

impl Firewalls {
    /// Looks which programs there are.
    pub(crate) fn open(_setting: Firewall, families: &[Family]) -> Result<Self, Error> {
        Ok(Self {
            iptables: Iptables::open(families)?,
        })
    }

    /// What all of them hold: lines of ours may stand in any.
    pub(crate) async fn read(&self) -> Result<Found, Error> {
        Ok(Found {
            iptables: self.iptables.read().await?,
        })
    }

    /// What lines are to be written with.
    pub(crate) fn backend(&self, _found: &Found) -> Backend {
        Backend::Iptables
    }

    /// Whether the back end's program is there for a family.
    ///
    /// # Errors
    /// [`Error::Missing`]
    pub(crate) fn require(&self, backend: Backend, family: Family) -> Result<(), Error> {
        match backend {
            Backend::Iptables => self.iptables.require(family),
        }
    }

    /// Whether lines of ours are, or would be, where the kernel tells nobody of a change.
    pub(crate) fn is_silent(&self, found: &Found) -> bool {
        self.iptables.is_silent(&found.iptables)
    }

    /// Makes steps that [`same_transaction`] has put together.
    pub(crate) async fn write(&self, steps: &[Step]) -> Result<(), Error> {
        match steps {
            [Step::InsertLine(_) | Step::DelLine(_), ..] => self.iptables.write(steps).await,
            // "did not" means that somebody else uses it by now: then it is theirs
            [Step::DropChain { family, chain, .. }] => drop_chain(*family, *chain).map(drop),
            [Step::DropTable { family }] => drop_table(*family).map(drop),
            _ => Ok(()),
        }
    }
}

/// Whether two steps that follow each other go to the kernel together.
pub(crate) fn same_transaction(left: &Step, right: &Step) -> bool {
    match (left, right) {
        (
            Step::InsertLine(left) | Step::DelLine(left),
            Step::InsertLine(right) | Step::DelLine(right),
        ) => left.program == right.program,
        _ => false,
    }
}

/// What must change so that this back end holds the wanted lines and no other does. Pure.
pub(crate) fn changes(
    goal: Goal,
    pathways: &[Pathway],
    backend: Backend,
    wanted: &Wanted,
    found: &Found,
) -> Vec<Change> {
    match backend {
        Backend::Iptables => lines::changes(goal, pathways, &wanted.lines, &found.iptables),
    }
}

/// Deletes a base chain that the first line of ours had made, if it is empty now. Whether it did.
///
/// # Errors
/// When nf_tables refuses for another reason than that it is in use.
pub(crate) fn drop_chain(family: Family, chain: Chain) -> Result<bool, Error> {
    residue::drop_chain(family, chain).map_err(|source| Error::Tables { family, source })
}

/// Deletes the mangle table that the first line of ours had made, if it is empty now. Whether it did.
///
/// # Errors
/// As [`drop_chain`].
pub(crate) fn drop_table(family: Family) -> Result<bool, Error> {
    residue::drop_table(family).map_err(|source| Error::Tables { family, source })
}
