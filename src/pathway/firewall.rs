//! Who gives replies their mark: the choice of a back end, and what the back ends hold.
//!
//! | file | owns |
//! |---|---|
//! | [`iptables`] | the programs of iptables, either variant; [`ruleset`] what they print, `lines` the plan |
//! | [`nftables`] | the program `nft`; [`table`] what our table holds, `replace` the plan |
//! | [`switch`] | the kernel's switch for doing without any of them |
//! | `residue` | what iptables-nft leaves behind |
//! | `program` | finding and running a program |
//!
//! Must not know: rules and routes, how a report is shown.

pub mod iptables;
mod lines;
pub mod nftables;
mod program;
mod replace;
mod residue;
pub mod ruleset;
pub mod switch;
pub mod table;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::model::{Family, Mark, Pathway};

use super::piece::{Chain, Step};
use super::plan::{Change, Goal, Wanted};
use iptables::Iptables;
use nftables::Nftables;
use ruleset::Ruleset;
pub use switch::Switch;
use table::Table;

/// Far longer than a packet needs.
const GRACE: Duration = Duration::from_millis(100);

/// What a person chose (`--firewall`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Firewall {
    /// What holds marks of ours already, else iptables where it is installed, else nftables
    #[default]
    Auto,
    /// iptables and ip6tables, of either variant
    Iptables,
    /// nftables, in a table of its own (inet mmproxy)
    Nftables,
    /// The kernel alone: TCP to this host's own addresses only, needs net.ipv4.tcp_fwmark_accept
    None,
}

impl Firewall {
    /// Its name as an option's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
            Self::None => "none",
        }
    }
}

/// What lines are written with, once that is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Lines in the mangle tables.
    Iptables,
    /// Entries in `table inet mmproxy`.
    Nftables,
    /// Nothing: TCP sockets take the mark from their client's packets.
    None,
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
    /// Neither of the two that would do.
    #[error(
        "neither iptables nor nftables is installed, and the services' answers need one of them for their mark: \
         install the package iptables or nftables, or see --firewall none"
    )]
    Neither,
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
    /// nf_tables could not be asked for our table.
    #[error("cannot ask nf_tables for table inet mmproxy")]
    OwnTable {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The table is there, and nothing to read it with.
    #[error(
        "table inet mmproxy is there, and nft, which would tell whose it is, is not installed (package nftables)"
    )]
    Unreadable,
    /// The listing is of an unknown shape.
    #[error("cannot understand what {program} -j list table inet mmproxy printed")]
    Shape {
        /// The program.
        program: String,
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
    /// `table inet mmproxy`, where there is one.
    pub nftables: Option<Table>,
}

impl Found {
    /// The marks in the tags of what is ours.
    pub(crate) fn marks(&self) -> BTreeSet<u32> {
        let lines = self.iptables.iter().flat_map(Ruleset::lines);
        let tags = lines.filter_map(|(_, line)| line.connmark.as_ref()?.tag());
        let entries = self.nftables.iter().flat_map(Table::marks);
        tags.chain(entries.map(Mark::get)).collect()
    }
}

/// The back ends that are installed, and which of them is wanted.
#[derive(Debug)]
pub(crate) struct Firewalls {
    setting: Firewall,
    iptables: Iptables,
    nftables: Nftables,
}

impl Firewalls {
    /// Looks which programs there are.
    pub(crate) fn open(setting: Firewall, families: &[Family]) -> Result<Self, Error> {
        Ok(Self {
            setting,
            nftables: Nftables::open(),
            iptables: Iptables::open(families)?,
        })
    }

    /// What all of them hold: lines of ours may stand in any.
    pub(crate) async fn read(&self) -> Result<Found, Error> {
        Ok(Found {
            iptables: self.iptables.read().await?,
            nftables: self.nftables.read().await?,
        })
    }

    /// What lines are to be written with.
    ///
    /// Nothing is moved without being asked for: entries of ours in nftables stay there, although
    /// iptables may have been installed since.
    pub(crate) fn backend(&self, found: &Found) -> Backend {
        let iptables = self.iptables.require(Family::V4).is_ok();
        let nftables = self.nftables.require().is_ok();
        match self.setting {
            Firewall::Iptables => Backend::Iptables,
            Firewall::Nftables => Backend::Nftables,
            Firewall::None => Backend::None,
            Firewall::Auto => {
                let ours = matches!(found.nftables, Some(Table::Ours { .. }));
                if ours && !found.iptables.iter().any(Ruleset::has_ours) || !iptables && nftables {
                    Backend::Nftables
                } else {
                    Backend::Iptables
                }
            }
        }
    }

    /// Whether the back end's program is there for a family.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Neither`]
    pub(crate) fn require(&self, backend: Backend, family: Family) -> Result<(), Error> {
        match backend {
            Backend::Iptables => match self.iptables.require(family) {
                Err(_) if self.setting == Firewall::Auto && family == Family::V4 => {
                    Err(Error::Neither)
                }
                required => required,
            },
            Backend::Nftables => self.nftables.require().map(drop),
            Backend::None => Ok(()),
        }
    }

    /// Whether lines of ours are, or would be, where the kernel tells nobody of a change.
    pub(crate) fn is_silent(&self, found: &Found) -> bool {
        let writes = self.backend(found) == Backend::Iptables;
        self.iptables.is_silent(&found.iptables, writes)
    }

    /// Makes steps that [`same_transaction`] has put together.
    pub(crate) async fn write(&self, steps: &[Step]) -> Result<(), Error> {
        match steps {
            [Step::InsertLine(_) | Step::DelLine(_), ..] => self.iptables.write(steps).await,
            [Step::Entries(_), ..] => self.nftables.write(steps).await,
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
        (Step::Entries(left), Step::Entries(right)) => Arc::ptr_eq(&left.swap, &right.swap),
        _ => false,
    }
}

/// Whether the second batch takes back what the first one's back end is to do instead.
pub(crate) fn is_switch(before: &Step, after: &Step) -> bool {
    let is_lines = |step: &Step| matches!(step, Step::InsertLine(_) | Step::DelLine(_));
    let is_entries = |step: &Step| matches!(step, Step::Entries(_));
    is_lines(before) && is_entries(after) || is_entries(before) && is_lines(after)
}

/// Returns when every packet that is on its way through the hooks has left them: one that came before
/// the new back end's hooks were there must not find those of the old one empty.
pub(crate) fn settle() {
    /// `MEMBARRIER_CMD_GLOBAL`: waits for an RCU grace period, which is what packets are under.
    const GLOBAL: libc::c_int = 1;
    // SAFETY: the call takes three numbers and touches no memory of ours
    #[expect(unsafe_code, reason = "neither nix nor libc has a function for it")]
    let settled = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if settled != 0 {
        // kernels with nohz_full processors do not offer it
        std::thread::sleep(GRACE);
    }
}

/// What must change so that this back end holds the wanted lines and no other does: its own change
/// first, so that a switch leaves no moment without. Pure.
pub(crate) fn changes(
    goal: Goal,
    pathways: &[Pathway],
    backend: Backend,
    wanted: &Wanted,
    found: &Found,
) -> Vec<Change> {
    let nothing = BTreeSet::new();
    let wanted_of = |of| {
        if backend == of {
            &wanted.lines
        } else {
            &nothing
        }
    };
    let iptables = wanted_of(Backend::Iptables);
    let mut lines = lines::changes(goal, pathways, iptables, &found.iptables);
    let nftables = wanted_of(Backend::Nftables);
    let mut entries = replace::changes(pathways, nftables, found.nftables.as_ref());
    if backend == Backend::Nftables {
        entries.append(&mut lines);
        return entries;
    }
    lines.append(&mut entries);
    lines
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
