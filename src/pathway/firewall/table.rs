//! `table inet mmproxy` as a value: the entries it holds, the chains and rules they need, and its text
//! for `nft -f -`.
//!
//! One look-up per mask and direction, whatever the number of pathways: a base chain's rule looks the
//! masked mark up in a map of marks, whose verdict jumps to a chain that sets all of the mask's bits.
//! (A chain for each mark, because nft before 1.1 combines a mark with constants only, and the bits
//! outside the mask are other programs'.) Pure; `parse` reads what nft lists, `words`
//! writes what it takes, `transaction` leads from one table to another.

mod parse;
#[cfg(test)]
mod tests;
mod transaction;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::model::{Interception, Mark, Mask};
use crate::pathway::piece::{COMMENT, Chain, Job, Line};
pub(crate) use transaction::transaction;

/// Its family and name.
pub const NAME: (&str, &str) = ("inet", "mmproxy");

/// `NF_IP_PRI_MANGLE`, where the mangle table of iptables stands, too.
const PRIORITY: i64 = -150;

/// What the table does for one mark in one place. Both families at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry {
    /// Where.
    pub chain: Chain,
    /// What.
    pub job: Job,
    /// The bits that count.
    pub mask: Mask,
    /// The mark.
    pub mark: Mark,
}

impl From<&Line> for Entry {
    fn from(line: &Line) -> Self {
        Self {
            chain: line.chain,
            job: line.job,
            mask: line.mask,
            mark: line.mark,
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let job = match self.job {
            Job::Save => "save",
            Job::Restore => "restore",
            Job::Intercept(one) => {
                let base = base_name(self.chain);
                return write!(
                    f,
                    "chain {base}, tproxy {one} for mark {:#x}",
                    self.mark.get()
                );
            }
        };
        write!(
            f,
            "chain {}, {job} mark {:#x}/{:#x}",
            base_name(self.chain),
            self.mark.get(),
            self.mask.get()
        )
    }
}

/// The table as found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Table {
    /// It carries our tag, in whatever condition.
    Ours {
        /// What it does for pathways.
        entries: BTreeSet<Entry>,
        /// Whether it does so: a flag (`dormant`) takes all of it out of the packets' way.
        awake: bool,
        /// Whether it holds just what these entries need.
        exact: bool,
        /// What it holds, where its chains and maps can stay: hooked in as ours are, and nothing else
        /// in the table.
        stays: Option<Layout>,
    },
    /// Another program's of the same name.
    Foreign,
    /// There, and no `nft` to tell whose it is.
    Unreadable,
}

impl Table {
    /// The marks of its entries; none where it is not ours.
    pub(crate) fn marks(&self) -> BTreeSet<Mark> {
        match self {
            Self::Ours { entries, .. } => entries.iter().map(|entry| entry.mark).collect(),
            Self::Foreign | Self::Unreadable => BTreeSet::new(),
        }
    }
}

/// Which mark a rule reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    /// The packet's (`meta mark`).
    Packet,
    /// The connection's (`ct mark`).
    Connection,
}

impl Key {
    fn words(self) -> &'static str {
        match self {
            Self::Packet => "meta mark",
            Self::Connection => "ct mark",
        }
    }

    /// The mark that a job looks for.
    fn read_by(job: Job) -> Self {
        match job {
            Job::Save => Self::Packet,
            _ => Self::Connection,
        }
    }

    /// The mark that a job changes.
    fn written_by(job: Job) -> Self {
        match job {
            Job::Save => Self::Connection,
            _ => Self::Packet,
        }
    }
}

/// The chains that marks lead to.
type Targets = BTreeMap<u32, String>;

/// Where a rule finds them.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Marks {
    /// In the table's map of this name.
    Map(String),
    /// In the rule itself, as the first builds had it. Such a map goes with its rule.
    Inline(Targets),
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Does {
    /// Looks the masked mark up and jumps to the chain found.
    Dispatch { key: Key, mask: u32, to: Marks },
    /// `key = (key & keep) ^ value`
    Set { key: Key, keep: u32, value: u32 },
    /// Jumps to a chain.
    Jump(String),
    /// Hands packets to a transparent listener, with [`crate::model::TRANSPARENT_MARK`] in these
    /// bits of their mark.
    Intercept { what: Interception, mask: u32 },
    /// Drops the same packets: those that no listener is there for, which would be forwarded.
    Refuse(Interception),
    /// What no rule of ours does.
    Other,
}

/// A rule of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct TableRule {
    comment: Option<String>,
    does: Does,
}

/// How a base chain is hooked in.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hook {
    kind: String,
    hook: String,
    priority: i64,
    policy: String,
}

impl Hook {
    fn of(chain: Chain) -> Self {
        // only the route type routes anew after the mark has changed, which OUTPUT needs
        let kind = match chain {
            Chain::Output => "route",
            Chain::Prerouting => "filter",
        };
        Self {
            kind: kind.to_owned(),
            hook: base_name(chain).to_owned(),
            priority: PRIORITY,
            policy: "accept".to_owned(),
        }
    }
}

/// A chain of the table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct TableChain {
    hook: Option<Hook>,
    rules: Vec<TableRule>,
}

/// The table's chains and maps by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layout {
    chains: BTreeMap<String, TableChain>,
    maps: BTreeMap<String, Targets>,
    /// Whether it has a flag, which ours never has.
    flagged: bool,
    /// Whether it holds objects that ours never has.
    strange: bool,
}

fn base_name(chain: Chain) -> &'static str {
    match chain {
        Chain::Output => "output",
        Chain::Prerouting => "prerouting",
    }
}

fn job_name(job: Job) -> &'static str {
    match job {
        Job::Save => "save",
        _ => "restore",
    }
}

fn chain_name(job: Job, mark: u32, mask: u32) -> String {
    format!("{}-{mark:#x}-{mask:#x}", job_name(job))
}

fn map_name(chain: Chain, job: Job, mask: u32) -> String {
    format!("{}-{}-{mask:#x}", base_name(chain), job_name(job))
}

/// What begins the name of a chain that hands packets to listeners: one for each pathway, so that a table that
/// was flushed can be told to be ours.
const INTERCEPT: &str = "intercept";

/// Whether only our own tables have chains of this name.
fn is_our_name(name: &str) -> bool {
    let number = |text: &str| {
        let digits = text.strip_prefix("0x")?;
        u32::from_str_radix(digits, 16).ok()
    };
    let mut parts = name.splitn(3, '-');
    matches!(parts.next(), Some("save" | "restore" | INTERCEPT))
        && parts.next().and_then(number).is_some()
        && parts.next().and_then(number).is_some()
}

impl Layout {
    /// What these entries need: saves before restores, each by mask, then what is handed to listeners.
    pub(crate) fn of(entries: &BTreeSet<Entry>) -> Self {
        let mut layout = Self::default();
        let mut intercepts = BTreeSet::new();
        let mut dispatches = BTreeMap::<(Chain, Job, Mask), Targets>::new();
        for entry in entries {
            let (mark, mask) = (entry.mark.get(), entry.mask.get());
            if let Job::Intercept(what) = entry.job {
                let comment = Some(format!("{COMMENT}{mark}"));
                let both = [Does::Intercept { what, mask }, Does::Refuse(what)];
                let name = format!("{INTERCEPT}-{mark:#x}-{mask:#x}");
                let chain = layout.chains.entry(name.clone()).or_default();
                chain.rules.extend(both.map(|does| TableRule {
                    comment: comment.clone(),
                    does,
                }));
                intercepts.insert(name);
                continue;
            }
            let name = chain_name(entry.job, mark, mask);
            dispatches
                .entry((entry.chain, entry.job, entry.mask))
                .or_default()
                .insert(mark, name.clone());
            let set = TableRule {
                comment: Some(format!("{COMMENT}{mark}")),
                does: Does::Set {
                    key: Key::written_by(entry.job),
                    keep: !mask,
                    value: mark,
                },
            };
            let rules = vec![set];
            layout.chains.insert(name, TableChain { hook: None, rules });
        }
        for ((chain, job, mask), targets) in dispatches {
            let map = map_name(chain, job, mask.get());
            layout.maps.insert(map.clone(), targets);
            layout.base(chain).rules.push(TableRule {
                comment: Some(COMMENT.trim_end_matches(':').to_owned()),
                does: Does::Dispatch {
                    key: Key::read_by(job),
                    mask: mask.get(),
                    to: Marks::Map(map),
                },
            });
        }
        for name in intercepts {
            let base = layout.base(Chain::Prerouting);
            base.rules.push(TableRule {
                comment: Some(COMMENT.trim_end_matches(':').to_owned()),
                does: Does::Jump(name),
            });
        }
        layout
    }

    /// The base chain, hooked in.
    fn base(&mut self, chain: Chain) -> &mut TableChain {
        let base = self.chains.entry(base_name(chain).to_owned());
        base.or_insert_with(|| TableChain {
            hook: Some(Hook::of(chain)),
            rules: Vec::new(),
        })
    }

    /// Whether it can be made right without going first.
    fn can_stay(&self) -> bool {
        let right = self.chains.iter().all(|(name, chain)| {
            let base = Chain::ALL.into_iter().find(|base| base_name(*base) == name);
            chain.hook == base.map(Hook::of)
        });
        right && !self.flagged && !self.strange
    }

    /// Where a rule leads.
    fn targets<'a>(&'a self, to: &'a Marks) -> impl Iterator<Item = (&'a u32, &'a String)> {
        let targets = match to {
            Marks::Map(name) => self.maps.get(name),
            Marks::Inline(targets) => Some(targets),
        };
        targets.into_iter().flatten()
    }

    /// What it does, as far as that is what an entry of ours does.
    fn entries(&self) -> BTreeSet<Entry> {
        let mut entries = BTreeSet::new();
        for chain in Chain::ALL {
            let Some(base) = self.chains.get(base_name(chain)) else {
                continue;
            };
            if base.hook != Some(Hook::of(chain)) {
                continue;
            }
            let is_save = |rule: &TableRule| matches!(rule.does, Does::Dispatch { key, .. } if key == Key::read_by(Job::Save));
            let last_save = base.rules.iter().rposition(is_save);
            let jumps = base.rules.iter().filter_map(|rule| match &rule.does {
                Does::Jump(name) => self.chains.get(name),
                _ => None,
            });
            entries.extend(jumps.flat_map(|to| intercepts(chain, &to.rules)));
            for (index, rule) in base.rules.iter().enumerate() {
                let Does::Dispatch { key, mask, to } = &rule.does else {
                    continue;
                };
                let job = if is_save(rule) {
                    Job::Save
                } else {
                    Job::Restore
                };
                // a packet's own mark goes before what its connection remembers
                if *key != Key::read_by(job) || job == Job::Restore && Some(index) < last_save {
                    continue;
                }
                for (mark, name) in self.targets(to) {
                    let set = self.chains.get(name).map(|chain| chain.rules.as_slice());
                    let wanted = Does::Set {
                        key: Key::written_by(job),
                        keep: !mask,
                        value: *mark,
                    };
                    if let (Some([TableRule { does, .. }]), Some(mark), Some(mask)) =
                        (set, Mark::new(*mark), Mask::new(*mask))
                        && *does == wanted
                    {
                        entries.insert(Entry {
                            chain,
                            job,
                            mask,
                            mark,
                        });
                    }
                }
            }
        }
        entries
    }

    /// Whether our tag is on a rule, or, where a flush has left no rule, in the chains' names.
    fn is_ours(&self) -> bool {
        let ours = |rule: &TableRule| {
            let tag = COMMENT.trim_end_matches(':');
            let comment = rule.comment.as_deref();
            comment.is_some_and(|text| text == tag || text.starts_with(COMMENT))
        };
        let mut rules = self.chains.values().flat_map(|chain| &chain.rules);
        let tagged = rules.any(ours);
        let empty = self.chains.values().all(|chain| chain.rules.is_empty());
        tagged || empty && self.chains.keys().any(|name| is_our_name(name))
    }
}

/// What is handed to listeners, and otherwise dropped.
fn intercepts(chain: Chain, rules: &[TableRule]) -> impl Iterator<Item = Entry> {
    rules.windows(2).filter_map(move |pair| {
        let [rule, next] = pair else { return None };
        let Does::Intercept { what, mask } = rule.does else {
            return None;
        };
        let mark = rule.comment.as_deref()?.strip_prefix(COMMENT)?;
        (next.does == Does::Refuse(what)).then_some(Entry {
            chain,
            job: Job::Intercept(what),
            mask: Mask::new(mask)?,
            mark: mark.parse().ok()?,
        })
    })
}
