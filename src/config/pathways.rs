//! `pathways.conf`: a mark a line, then `key=value` words.
//!
//! Owns: the lines, and what pathways may not have in common. Must not know: instances.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::diagnostics::{Diagnostic, Diagnostics};
use super::options::Options;
use super::source::{Source, Word};
use super::targets;
use crate::model::{ConnmarkMode, Mark, Mask, Pathway, Priority, TableId, ValueError};

const OPTIONS: [&str; 6] = ["table", "priority", "mask", "targets", "name", "connmark"];

/// Bits of the mark that other programs set on packets of their own choice.
const FOREIGN_BITS: [(&str, u32); 2] = [("Tailscale", 0x00ff_0000), ("kube-proxy", 0xc000)];

/// Tables that other programs fill.
const FOREIGN_TABLES: [(&str, u32); 2] = [("Tailscale", 52), ("wg-quick", 51820)];

/// A line of pathways.conf whose mark is a mark.
#[derive(Debug)]
pub(super) struct Line<'s> {
    pub(super) mark: Mark,
    pub(super) mark_word: Word<'s>,
    name: Option<(String, Word<'s>)>,
    /// None where it is no table; the word is the mark where nothing was said.
    table: Option<(TableId, Word<'s>)>,
    /// None where it is no mask or does not cover the mark.
    pub(super) mask: Option<(Mask, Word<'s>)>,
    priority: Priority,
    connmark: ConnmarkMode,
    targets: BTreeSet<IpNet>,
}

impl Line<'_> {
    /// The pathway, unless the line had a mistake that leaves it without table or mask.
    pub(super) fn pathway(&self) -> Option<Pathway> {
        Some(Pathway {
            name: self.name.as_ref().map(|(name, _)| name.clone()),
            mark: self.mark,
            mask: self.mask?.0,
            table: self.table?.0,
            priority: self.priority,
            connmark: self.connmark,
            targets: self.targets.clone(),
            udp: BTreeSet::new(),
            interceptions: BTreeSet::new(),
        })
    }
}

/// Reads the file; mistakes go to `found`, and what could be read is returned for further checks.
pub(super) fn parse<'s>(source: &'s Source, found: &mut Diagnostics) -> Vec<Line<'s>> {
    let lines: Vec<Line<'s>> = source
        .lines()
        .map(Word::before_comment)
        .filter(|content| !content.text.is_empty())
        .filter_map(|content| parse_line(source, content, found))
        .collect();
    check_together(source, &lines, found);
    lines
}

fn parse_line<'s>(
    source: &'s Source,
    content: Word<'s>,
    found: &mut Diagnostics,
) -> Option<Line<'s>> {
    if let Some(diagnostic) = source.unreadable(content) {
        found.push(diagnostic);
        return None;
    }
    let mut words = content.words();
    let mark_word = words.next()?;
    let mark = match mark_word.text.parse::<Mark>() {
        Ok(mark) => Some(mark),
        Err(mistake) => {
            found.push(Diagnostic::value(source.position(mark_word), mistake));
            None
        }
    };
    // the options are looked at whatever the mark is, so that their mistakes show in the same run
    let words = words.map(|word| (word, content));
    let options = Options::new(source, words, &OPTIONS, found);
    let table = options.value("table", str::parse::<TableId>, found);
    let priority = options.value("priority", str::parse, found);
    let mask = options.value("mask", str::parse::<Mask>, found);
    let connmark = options.value("connmark", str::parse, found);
    let name = options.value("name", parse_name, found);
    let targets = options
        .text("targets")
        .map(|list| targets::parse(source, &options, list, found))
        .unwrap_or_default();
    let mark = mark?;

    let table = match (table, options.word("table")) {
        (Some(table), Some(word)) => Some((table, word)),
        (_, Some(_)) => None,
        (_, None) => default_table(source, mark, mark_word, found).map(|table| (table, mark_word)),
    };
    let mask = match (mask, options.word("mask")) {
        (Some(mask), Some(word)) if mask.covers(mark) => Some((mask, word)),
        (Some(mask), Some(word)) => {
            found.push(
                Diagnostic::error(
                    source.position(word),
                    format!(
                        "mark {mark} ({:#x}) has bits outside its mask {mask}",
                        mark.get()
                    ),
                    format!(
                        "a mask with all bits of the mark, such as {}",
                        Mask::default_for(mark)
                    ),
                )
                .with(&source.position(mark_word), "the mark"),
            );
            None
        }
        (_, Some(_)) => None,
        (_, None) => Some((Mask::default_for(mark), mark_word)),
    };
    if let Some((mask, word)) = mask {
        warn_foreign_bits(source, mark, mask, word, found);
    }
    if let Some((table, word)) = table
        && let Some((program, _)) = FOREIGN_TABLES.iter().find(|(_, id)| *id == table.get())
    {
        found.push(Diagnostic::warning(
            source.position(word),
            format!("table {table} is the one that {program} fills"),
            format!("table= with another number where {program} runs on this host"),
        ));
    }
    Some(Line {
        mark,
        mark_word,
        name: name.zip(options.word("name")),
        table,
        mask,
        priority: priority.unwrap_or(Priority::DEFAULT),
        connmark: connmark.unwrap_or_default(),
        targets,
    })
}

fn default_table(
    source: &Source,
    mark: Mark,
    word: Word<'_>,
    found: &mut Diagnostics,
) -> Option<TableId> {
    let table = TableId::new(mark.get());
    if table.is_none() {
        found.push(Diagnostic::error(
            source.position(word),
            format!("mark {mark} cannot be its own table: table {mark} belongs to the system"),
            format!("table= with another number behind it, such as '{mark} table=1{mark}'"),
        ));
    }
    table
}

fn warn_foreign_bits(
    source: &Source,
    mark: Mark,
    mask: Mask,
    word: Word<'_>,
    found: &mut Diagnostics,
) {
    let overlaps: Vec<String> = FOREIGN_BITS
        .iter()
        .filter(|(_, bits)| mask.get() & bits != 0)
        .map(|(program, bits)| format!("{program} ({bits:#x})"))
        .collect();
    if overlaps.is_empty() {
        return;
    }
    // the smallest run of low bits that holds the mark
    let narrow = u32::MAX >> mark.get().leading_zeros();
    let free = FOREIGN_BITS.iter().all(|(_, bits)| narrow & bits == 0);
    let way_out = if free {
        format!("mask={narrow:#x}")
    } else {
        "a smaller mark".to_owned()
    };
    found.push(Diagnostic::warning(
        source.position(word),
        format!(
            "mask {mask} of mark {mark} has bits that {} may set: such packets miss the pathway",
            overlaps.join(" and ")
        ),
        format!("{way_out} where that runs on this host"),
    ));
}

fn parse_name(text: &str) -> Result<String, ValueError> {
    let valid = !text.is_empty()
        && text.len() <= 64
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if valid {
        Ok(text.to_owned())
    } else {
        Err(ValueError::new(
            format!("'{text}' is not a name"),
            "letters, digits, '.', '_' and '-', at most 64 of them",
        ))
    }
}

/// What two pathways may not have in common: mark, table, name, and packets that match both.
fn check_together(source: &Source, lines: &[Line<'_>], found: &mut Diagnostics) {
    let mut marks: BTreeMap<Mark, &Line<'_>> = BTreeMap::new();
    let mut tables: BTreeMap<TableId, &Line<'_>> = BTreeMap::new();
    let mut names: BTreeMap<&str, Word<'_>> = BTreeMap::new();
    for line in lines {
        if let Some((name, word)) = &line.name
            && let Some(first) = names.insert(name, *word)
        {
            found.push(
                Diagnostic::error(
                    source.position(*word),
                    format!("two pathways are named {name}"),
                    "a name of its own",
                )
                .with(&source.position(first), "the other one"),
            );
        }
        if let Some(first) = marks.get(&line.mark) {
            found.push(
                Diagnostic::error(
                    source.position(line.mark_word),
                    format!("mark {} is defined twice", line.mark),
                    "each mark once",
                )
                .with(&source.position(first.mark_word), "first defined here"),
            );
            // its table and mask would only repeat the same complaint
            continue;
        }
        if let Some((table, word)) = line.table {
            match tables.get(&table) {
                Some(first) => {
                    let theirs = first.table.map_or(first.mark_word, |(_, word)| word);
                    found.push(
                        Diagnostic::error(
                            source.position(word),
                            format!(
                                "marks {} and {} both use table {table}",
                                first.mark, line.mark
                            ),
                            "a table of its own, with table= (the default is the mark)",
                        )
                        .with(
                            &source.position(theirs),
                            format!("table {table} of mark {}", first.mark),
                        ),
                    );
                }
                None => {
                    tables.insert(table, line);
                }
            }
        }
        for other in marks.values() {
            check_masks(source, other, line, found);
        }
        marks.insert(line.mark, line);
    }
}

fn check_masks(source: &Source, first: &Line<'_>, second: &Line<'_>, found: &mut Diagnostics) {
    let (Some((first_mask, first_word)), Some((second_mask, second_word))) =
        (first.mask, second.mask)
    else {
        return;
    };
    // a mark is covered by its mask, so mark & mask == mark
    let matches = |mark: Mark, mask: Mask, other: Mark| other.get() & mask.get() == mark.get();
    let (taker, mask, word, other) = if matches(first.mark, first_mask, second.mark) {
        (first.mark, first_mask, first_word, second)
    } else if matches(second.mark, second_mask, first.mark) {
        (second.mark, second_mask, second_word, first)
    } else {
        return;
    };
    found.push(
        Diagnostic::error(
            source.position(word),
            format!(
                "mark {taker} under its mask {mask} matches the packets of mark {} too",
                other.mark
            ),
            format!(
                "masks that tell the two apart, such as mask={:#x}",
                wide_enough(taker, other.mark)
            ),
        )
        .with(
            &source.position(other.mark_word),
            format!("{} & {mask} = {taker}", other.mark),
        ),
    );
}

/// The smallest run of low bits in which two different marks differ and that holds both.
fn wide_enough(one: Mark, other: Mark) -> u32 {
    u32::MAX >> (one.get() | other.get()).leading_zeros()
}
