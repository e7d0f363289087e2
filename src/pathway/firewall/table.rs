//! `table inet mmproxy` as a value: the entries it holds, the chains and rules they need, and its text
//! for `nft -f -`.
//!
//! One look-up per mask and direction, whatever the number of pathways: a base chain's rule looks the
//! masked mark up in a map of marks, whose verdict jumps to a chain that sets all of the mask's bits.
//! (A chain for each mark, because nft before 1.1 combines a mark with constants only, and the bits
//! outside the mask are other programs'.) Pure; `parse` reads what nft lists, `words`
//! writes what it takes.

mod parse;
#[cfg(test)]
mod tests;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::model::{Interception, Mark, Mask};
use crate::pathway::piece::{COMMENT, Chain, Job, Line};

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
        /// Its chains, where they can stay: hooked in as ours are, and nothing else in the table.
        chains: Option<BTreeSet<String>>,
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

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Does {
    /// Looks the masked mark up and jumps to the chain found.
    Dispatch {
        key: Key,
        mask: u32,
        to: BTreeMap<u32, String>,
    },
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

/// The table's chains by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Layout {
    chains: BTreeMap<String, TableChain>,
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

fn chain_name(job: Job, mark: u32, mask: u32) -> String {
    let job = match job {
        Job::Save => "save",
        _ => "restore",
    };
    format!("{job}-{mark:#x}-{mask:#x}")
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
    fn of(entries: &BTreeSet<Entry>) -> Self {
        let mut layout = Self::default();
        let mut intercepts = BTreeSet::new();
        let mut dispatches = BTreeMap::<(Chain, Job, Mask), BTreeMap<u32, String>>::new();
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
        for ((chain, job, mask), to) in dispatches {
            layout.base(chain).rules.push(TableRule {
                comment: Some(COMMENT.trim_end_matches(':').to_owned()),
                does: Does::Dispatch {
                    key: Key::read_by(job),
                    mask: mask.get(),
                    to,
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

    /// The chains' names, unless the table must go before it can be right.
    fn chains_that_can_stay(&self) -> Option<BTreeSet<String>> {
        let right = self.chains.iter().all(|(name, chain)| {
            let base = Chain::ALL.into_iter().find(|base| base_name(*base) == name);
            chain.hook == base.map(Hook::of)
        });
        (right && !self.flagged && !self.strange).then(|| self.chains.keys().cloned().collect())
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
                for (mark, name) in to {
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

/// The transaction that leaves just these entries in the table, and no table without any. `chains` are
/// the table's; `None` has it go first.
///
/// `add` first, so that it works whether the table is there or not. Chains that are needed stay, and
/// only their rules are exchanged: a packet that is on its way through the hooks knows the old chains,
/// and would find them empty and the new ones not at all.
pub(crate) fn transaction(entries: &BTreeSet<Entry>, chains: Option<&BTreeSet<String>>) -> String {
    let (family, name) = NAME;
    let Layout { chains: wanted, .. } = Layout::of(entries);
    let mut text = format!("add table {family} {name}\n");
    match chains {
        Some(_) if !entries.is_empty() => {
            text.push_str(&format!("flush table {family} {name}\n"));
        }
        _ => text.push_str(&format!("delete table {family} {name}\n")),
    }
    if entries.is_empty() {
        return text;
    }
    let gone: Vec<String> = chains
        .into_iter()
        .flatten()
        .filter(|chain| !wanted.contains_key(*chain))
        .map(|chain| format!("delete chain {family} {name} {chain}\n"))
        .collect();
    text.push_str(&format!("table {family} {name} {{\n"));
    // a chain must be there before a rule jumps to it
    let (bases, jumps): (Vec<_>, Vec<_>) = wanted
        .into_iter()
        .partition(|(_, chain)| chain.hook.is_some());
    for (name, chain) in jumps.into_iter().chain(bases) {
        text.push_str(&format!("  chain {name} {{\n"));
        if let Some(hook) = chain.hook {
            let Hook {
                kind, hook, policy, ..
            } = hook;
            text.push_str(&format!(
                "    type {kind} hook {hook} priority mangle; policy {policy};\n"
            ));
        }
        for rule in chain.rules {
            let comment = rule.comment.unwrap_or_default();
            text.push_str(&format!("    {} comment \"{comment}\"\n", rule.does));
        }
        text.push_str("  }\n");
    }
    text.push_str("}\n");
    text.extend(gone);
    text
}

/// The names of the chains that these entries need.
pub(crate) fn chains_of(entries: &BTreeSet<Entry>) -> BTreeSet<String> {
    Layout::of(entries).chains.into_keys().collect()
}
