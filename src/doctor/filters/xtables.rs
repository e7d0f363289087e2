//! What `iptables-save -c` and its kin write.

use std::collections::{BTreeMap, BTreeSet};

use super::{Action, At, Base, FilterRule, Matches, Named, Prefix};
use crate::model::Family;

/// Reads the whole of it, every table.
pub fn parse(program: &str, family: Family, save: &str) -> Vec<FilterRule> {
    let mut rules = Vec::new();
    let mut table = Table::default();
    for line in save.lines() {
        match line.as_bytes().first() {
            Some(b'*') => {
                rules.append(&mut table.finish());
                table = Table::new(program, family, &line[1..]);
            }
            Some(b':') => table.chain(&line[1..]),
            Some(b'[') => table.line(line),
            _ => {}
        }
    }
    rules.append(&mut table.finish());
    rules
}

#[derive(Default)]
struct Table {
    program: String,
    family: String,
    name: String,
    jumps: BTreeMap<String, BTreeSet<String>>,
    builtin: BTreeSet<String>,
    rules: Vec<FilterRule>,
}

impl Table {
    fn new(program: &str, family: Family, name: &str) -> Self {
        Self {
            program: program.to_owned(),
            family: match family {
                Family::V4 => "ip".to_owned(),
                Family::V6 => "ip6".to_owned(),
            },
            name: name.to_owned(),
            ..Self::default()
        }
    }

    fn at(&self, chain: &str) -> At {
        At {
            program: self.program.clone(),
            family: self.family.clone(),
            table: self.name.clone(),
            chain: chain.to_owned(),
            bases: Vec::new(),
        }
    }

    /// `INPUT DROP [5:300]`, or `mine - [0:0]`.
    fn chain(&mut self, text: &str) {
        let mut words = text.split_whitespace();
        let (Some(name), Some(policy), counts) = (words.next(), words.next(), words.next()) else {
            return;
        };
        if policy != "-" {
            self.builtin.insert(name.to_owned());
        }
        if policy == "DROP" {
            self.rules.push(FilterRule {
                at: self.at(name),
                text: format!("-P {name} DROP"),
                matches: Matches::default(),
                action: Action::Drop,
                packets: counts.and_then(packets),
                ours: false,
            });
        }
    }

    /// `[5:300] -A INPUT -i lo -j DROP`.
    fn line(&mut self, line: &str) {
        let Some((counts, rest)) = line.split_once(' ') else {
            return;
        };
        let Some((chain, words)) = rest
            .strip_prefix("-A ")
            .map(|rest| rest.split_once(' ').unwrap_or((rest, "")))
        else {
            return;
        };
        let (matches, action, target) = read(words);
        if let Some(target) = target {
            let from = self.jumps.entry(target).or_default();
            from.insert(chain.to_owned());
        }
        self.rules.push(FilterRule {
            at: self.at(chain),
            text: format!("-A {chain} {words}"),
            matches,
            action,
            packets: packets(counts),
            ours: words.contains("mmproxyctl:"),
        });
    }

    fn finish(&mut self) -> Vec<FilterRule> {
        let mut rules = std::mem::take(&mut self.rules);
        for rule in &mut rules {
            rule.at.bases = self.bases(&rule.at.chain);
        }
        rules
    }

    fn bases(&self, chain: &str) -> Vec<Base> {
        let mut seen = BTreeSet::from([chain.to_owned()]);
        let mut open = vec![chain.to_owned()];
        while let Some(chain) = open.pop() {
            for from in self.jumps.get(&chain).into_iter().flatten() {
                if seen.insert(from.clone()) {
                    open.push(from.clone());
                }
            }
        }
        let bases = seen.into_iter().filter(|name| self.builtin.contains(name));
        bases
            .map(|chain| Base {
                hook: chain.to_lowercase(),
                chain,
            })
            .collect()
    }
}

/// `[packets:bytes]`.
fn packets(text: &str) -> Option<(u64, u64)> {
    let count = text.strip_prefix('[')?.split(':').next()?.parse().ok()?;
    Some((count, count))
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn masked(text: &str) -> Option<(u32, u32)> {
    match text.split_once('/') {
        Some((value, mask)) => Some((number(value)?, number(mask)?)),
        None => Some((number(text)?, u32::MAX)),
    }
}

fn ports(text: &str) -> Option<(u16, u16)> {
    match text.split_once(':') {
        Some((from, to)) => Some((from.parse().ok()?, to.parse().ok()?)),
        None => text.parse().ok().map(|port| (port, port)),
    }
}

/// What the words behind the chain's name match and do, and the chain that they jump to.
fn read(words: &str) -> (Matches, Action, Option<String>) {
    let mut matches = Matches::default();
    let (mut action, mut target) = (Action::Other, None);
    let (mut inverted, mut module) = (false, "");
    let mut words = words.split_whitespace();
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_default();
        match word {
            "!" => {
                inverted = true;
                continue;
            }
            "-i" | "-o" => {
                let named = Some(Named {
                    name: value().to_owned(),
                    inverted,
                });
                if word == "-i" {
                    matches.iif = named;
                } else {
                    matches.oif = named;
                }
            }
            "-s" | "-d" => {
                let prefix = value().parse().ok().map(|net| Prefix { net, inverted });
                matches.beyond |= prefix.is_none();
                if word == "-s" {
                    matches.source = prefix;
                } else {
                    matches.destination = prefix;
                }
            }
            "-p" if !inverted => matches.protocol = Some(value().to_owned()),
            "--sport" if !inverted => matches.sport = ports(value()),
            "--dport" if !inverted => matches.dport = ports(value()),
            "-m" => module = value(),
            "--mark" if module == "mark" => {
                matches.mark = masked(value()).map(|(mark, mask)| (mark, mask, inverted));
            }
            "--comment" => skip_quoted(&mut words),
            "-j" | "-g" => match value() {
                "DROP" | "REJECT" => action = Action::Drop,
                "ACCEPT" | "RETURN" => action = Action::Accept,
                "NOTRACK" => action = Action::NoTrack,
                other => target = Some(other.to_owned()),
            },
            "--notrack" => action = Action::NoTrack,
            "--set-xmark" | "--set-mark" if target.as_deref() == Some("MARK") => {
                if let Some((mark, mask)) = masked(value()) {
                    // --set-xmark value/mask: the bits of mask are cleared, those of value are flipped
                    action = Action::SetMark(mark, mask | mark);
                }
            }
            "--reject-with" => _ = value(),
            _ if target.is_none() && action == Action::Other && word.starts_with("--") => {
                // a match that is not understood here; its value is passed over as a word of no meaning
                matches.beyond = true;
            }
            _ => {}
        }
        inverted = false;
    }
    (matches, action, target)
}

/// Passes over the rest of a quoted word.
fn skip_quoted<'w>(words: &mut impl Iterator<Item = &'w str>) {
    let Some(first) = words.next() else { return };
    let closed = |word: &str| word.ends_with('"') && !word.ends_with("\\\"");
    if !first.starts_with('"') || (first.len() > 1 && closed(first)) {
        return;
    }
    for word in words {
        if closed(word) {
            return;
        }
    }
}
