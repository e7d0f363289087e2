//! The text for `nft -f -` that leads from the table as found to the one wanted, without a moment in
//! which a packet finds neither.
//!
//! The kernel keeps the old rules for a packet that has begun on them, and none of the map elements that
//! go in the same transaction: a look-up is made among those that count at its own moment, also by an old
//! rule. So rules may be exchanged for the same ones, and an element that is needed afterwards must stay
//! as it is, in a map with a name of its own. (One within a rule goes with the rule.)

use std::collections::BTreeSet;

use super::words::elements;
use super::{Entry, Hook, Layout, NAME, TableChain, Targets};

/// The transaction that leaves just these entries in the table, and no table without any. `found` is
/// what the table holds; `None` has it go first.
///
/// `add` first, so that it works whether the table is there or not. Chains that are needed stay, too, and
/// only their rules are exchanged: a packet that is on its way through the hooks knows the old chains,
/// and would find them empty and the new ones not at all.
pub(crate) fn transaction(entries: &BTreeSet<Entry>, found: Option<&Layout>) -> String {
    let (family, table) = NAME;
    let mut text = format!("add table {family} {table}\n");
    let found = match found {
        Some(found) if !entries.is_empty() => {
            text.push_str(&format!("flush table {family} {table}\n"));
            found
        }
        _ => {
            text.push_str(&format!("delete table {family} {table}\n"));
            &Layout::default()
        }
    };
    if entries.is_empty() {
        return text;
    }
    let wanted = Layout::of(entries);
    let nothing = Targets::new();
    for (name, targets) in &wanted.maps {
        let before = found.maps.get(name).unwrap_or(&nothing);
        let gone = without(before, targets);
        if !gone.is_empty() {
            let marks: Vec<_> = gone.iter().map(|(mark, _)| format!("{mark:#x}")).collect();
            let marks = marks.join(", ");
            text.push_str(&format!(
                "delete element {family} {table} {name} {{ {marks} }}\n"
            ));
        }
    }
    text.push_str(&format!("table {family} {table} {{\n"));
    // a chain must be there before a map or a rule jumps to it, and a map before a rule looks it up
    let (bases, jumps): (Vec<_>, Vec<_>) = wanted
        .chains
        .iter()
        .partition(|(_, chain)| chain.hook.is_some());
    text.extend(jumps.into_iter().map(chain_block));
    for (name, targets) in &wanted.maps {
        text.push_str(&format!("  map {name} {{\n    type mark : verdict\n"));
        let before = found.maps.get(name).unwrap_or(&nothing);
        let new = without(targets, before);
        if !new.is_empty() {
            text.push_str(&format!("    elements = {}\n", elements(new)));
        }
        text.push_str("  }\n");
    }
    text.extend(bases.into_iter().map(chain_block));
    text.push_str("}\n");
    let maps = found.maps.keys();
    let chains = found.chains.keys();
    let maps = maps.filter(|name| !wanted.maps.contains_key(*name));
    let chains = chains.filter(|name| !wanted.chains.contains_key(*name));
    text.extend(maps.map(|name| format!("delete map {family} {table} {name}\n")));
    text.extend(chains.map(|name| format!("delete chain {family} {table} {name}\n")));
    text
}

/// The elements that the others lack, or have otherwise.
fn without<'a>(all: &'a Targets, others: &Targets) -> Vec<(&'a u32, &'a String)> {
    let lacks = |(mark, name): &(&u32, &String)| others.get(mark) != Some(name);
    all.iter().filter(lacks).collect()
}

fn chain_block((name, chain): (&String, &TableChain)) -> String {
    let mut text = format!("  chain {name} {{\n");
    if let Some(hook) = &chain.hook {
        let Hook {
            kind, hook, policy, ..
        } = hook;
        text.push_str(&format!(
            "    type {kind} hook {hook} priority mangle; policy {policy};\n"
        ));
    }
    for rule in &chain.rules {
        let comment = rule.comment.as_deref().unwrap_or_default();
        text.push_str(&format!("    {} comment \"{comment}\"\n", rule.does));
    }
    text.push_str("  }\n");
    text
}
