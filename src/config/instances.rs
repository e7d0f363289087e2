//! `instances.tsv`: one relay a line, in columns between tabs.
//!
//! Owns: records, columns, and what instances may not have in common. Must not know: pathways.conf.

use std::net::{SocketAddrV4, SocketAddrV6};
use std::path::PathBuf;

use csv::{ReaderBuilder, StringRecord, Terminator};

use super::columns::{self, NAMES, REQUIRED, Row, Target, Tried};
use super::diagnostics::{Diagnostic, Diagnostics};
use super::instance_options;
use super::source::{Source, Word};
use crate::model::{
    Instance, InstanceName, Listen, Mark, NamedTargets, PortRange, Protocol, TargetPorts,
};

const WHAT_A_LINE_HAS: &str =
    "name, fwmark, listen_addr, target_ipv4, target_port, target_ipv6 and at most options";

/// A line of instances.tsv, as far as it could be read.
#[derive(Debug)]
pub(super) struct Line<'s> {
    pub(super) name: Option<(InstanceName, Word<'s>)>,
    pub(super) mark: Option<(Mark, Word<'s>)>,
    pub(super) listen: Option<(Listen, Word<'s>)>,
    pub(super) protocol: Protocol,
    /// The allow list of its own, as written.
    pub(super) allow: Option<(PathBuf, Word<'s>)>,
    /// Where its targets are, for complaints about them.
    pub(super) target4_word: Option<Word<'s>>,
    pub(super) target6_word: Option<Word<'s>>,
    /// None when the line has a mistake.
    pub(super) instance: Option<Instance>,
}

/// Reads the file; mistakes go to `found`, and what could be read is returned for further checks.
pub(super) fn parse<'s>(source: &'s Source, found: &mut Diagnostics) -> Vec<Line<'s>> {
    records(source, found)
        .into_iter()
        .filter_map(|cells| parse_line(source, cells, found))
        .collect()
}

/// The cells of each line that has any, untrimmed.
pub(super) fn records<'s>(source: &'s Source, found: &mut Diagnostics) -> Vec<Vec<Word<'s>>> {
    let text = source.text();
    let mut reader = ReaderBuilder::new()
        .delimiter(b'\t')
        .terminator(Terminator::Any(b'\n'))
        .quoting(false)
        .flexible(true)
        .has_headers(false)
        .from_reader(text.as_bytes());
    let mut record = StringRecord::new();
    let mut all = Vec::new();
    loop {
        match reader.read_record(&mut record) {
            Ok(true) => {}
            Ok(false) => return all,
            Err(error) => {
                found.push(Diagnostic::error(
                    source.path(),
                    error.to_string(),
                    "tab-separated text",
                ));
                return all;
            }
        }
        // The record's own position is where the reader stood before it skipped empty lines. Where it
        // stands now is exact, and without quoting the cells and the tabs between them are the line.
        let after = usize::try_from(reader.position().byte()).unwrap_or(usize::MAX);
        let consumed = text.get(..after).unwrap_or(text);
        let end = consumed.strip_suffix('\n').unwrap_or(consumed).len();
        let length: usize = record.iter().map(|cell| cell.len() + 1).sum();
        let mut start = (end + 1).saturating_sub(length);
        let mut cells = Vec::with_capacity(record.len());
        for cell in &record {
            cells.push(source.word(start..start + cell.len()));
            start += cell.len() + 1;
        }
        all.push(cells);
    }
}

fn parse_line<'s>(
    source: &'s Source,
    cells: Vec<Word<'s>>,
    found: &mut Diagnostics,
) -> Option<Line<'s>> {
    let cells = without_comment(cells);
    let (first, last) = (cells.first()?, cells.last()?);
    let content = source.word(first.start()..last.start() + last.text.len());
    if let Some(diagnostic) = source.unreadable(content) {
        found.push(diagnostic);
        return None;
    }
    let cells = columns_of(source, content, cells, found)?;
    let row: Row =
        match StringRecord::from_iter(cells.iter().map(|cell| cell.text)).deserialize(None) {
            Ok(row) => row,
            Err(error) => {
                found.push(Diagnostic::error(
                    source.position(content),
                    error.to_string(),
                    WHAT_A_LINE_HAS,
                ));
                return None;
            }
        };
    Some(
        Cells {
            source,
            content,
            cells,
        }
        .line(row, found),
    )
}

/// The cells up to a `#` that begins a word; empty cells at the end do not count.
fn without_comment(cells: Vec<Word<'_>>) -> Vec<Word<'_>> {
    let mut kept = Vec::with_capacity(cells.len());
    for cell in cells {
        let comment = cell
            .text
            .match_indices('#')
            .map(|(at, _)| at)
            .find(|at| *at == 0 || cell.text[..*at].ends_with(' '));
        kept.push(cell.part(0..comment.unwrap_or(cell.text.len())).trimmed());
        if comment.is_some() {
            break;
        }
    }
    while kept.last().is_some_and(|cell| cell.text.is_empty()) {
        kept.pop();
    }
    kept
}

/// Brings a line to six or seven cells, complaining where that takes guessing.
fn columns_of<'s>(
    source: &'s Source,
    content: Word<'s>,
    cells: Vec<Word<'s>>,
    found: &mut Diagnostics,
) -> Option<Vec<Word<'s>>> {
    let fits = |count: usize| (REQUIRED..=NAMES.len()).contains(&count);
    let has_space = |cell: &&Word<'_>| cell.text.contains(' ');
    if let Some(cell) = cells.iter().take(REQUIRED).find(has_space) {
        let from = cell.text.find(' ').unwrap_or(0);
        let spaces = cell.text[from..].len() - cell.text[from..].trim_start_matches(' ').len();
        found.push(Diagnostic::error(
            source.position(cell.part(from..from + spaces)),
            "spaces instead of a tab between columns",
            "one tab",
        ));
        let words: Vec<Word<'s>> = content.words().collect();
        return fits(words.len()).then_some(words);
    }
    if fits(cells.len()) {
        return Some(cells);
    }
    let count = cells.len();
    if count < REQUIRED {
        let noun = if count == 1 { "column" } else { "columns" };
        found.push(Diagnostic::error(
            source.position(content),
            format!("{count} {noun} where {REQUIRED} are needed"),
            format!("{WHAT_A_LINE_HAS}, one tab between them"),
        ));
        return Some(cells);
    }
    let filled: Vec<Word<'s>> = cells
        .iter()
        .copied()
        .filter(|cell| !cell.text.is_empty())
        .collect();
    if fits(filled.len()) {
        // aligned by eye: a run of tabs where one belongs
        let place = cells
            .iter()
            .position(|cell| cell.text.is_empty())
            .unwrap_or(0);
        let before = cells[place.saturating_sub(1)];
        let gap = before.start() + before.text.len()..content.start() + content.text.len();
        let gap = source.word(gap);
        let width = gap.text.len() - gap.text.trim_start_matches([' ', '\t']).len();
        found.push(Diagnostic::error(
            source.position(gap.part(0..width)),
            "several tabs between columns",
            "one tab",
        ));
        return Some(filled);
    }
    found.push(Diagnostic::error(
        source.position(cells[NAMES.len()]),
        format!("{count} columns where at most {} belong", NAMES.len()),
        WHAT_A_LINE_HAS,
    ));
    Some(cells.into_iter().take(NAMES.len()).collect())
}

/// One line's cells while they become an instance.
struct Cells<'s> {
    source: &'s Source,
    content: Word<'s>,
    cells: Vec<Word<'s>>,
}

impl<'s> Cells<'s> {
    fn line(&self, row: Row, found: &mut Diagnostics) -> Line<'s> {
        let before = found.errors();
        let cell = self
            .cells
            .get(columns::OPTIONS)
            .copied()
            .filter(|cell| !cell.text.is_empty());
        let (options, allow) = instance_options::parse(self.source, cell, found);
        // also where it lacks its destinations: one complaint is enough
        let in_header = cell.is_some_and(|cell| {
            let mut words = cell.split(|c| c == ',');
            words.any(|word| word.trimmed().text.starts_with("target="))
        });
        let name = self.take(columns::NAME, row.name, found);
        let mark = self.take(columns::FWMARK, row.fwmark, found);
        let listen =
            self.take(columns::LISTEN, row.listen_addr, found)
                .and_then(|(listen, word)| {
                    let place = (&listen, word);
                    let mode = options.listen;
                    instance_options::listen_as(self.source, place, cell, mode, found)
                        .map(|listen| (listen, word))
                });
        let target4 = self.take(columns::TARGET4, row.target_ipv4, found);
        let no_port = in_header
            && self
                .cells
                .get(columns::PORT)
                .is_some_and(|cell| cell.text == "-");
        let port = match no_port {
            true => None,
            false => self.take(columns::PORT, row.target_port, found),
        };
        let target6 = self.take(columns::TARGET6, row.target_ipv6, found);
        if in_header {
            self.check_no_target(found);
        } else if let (Some((Target::NotServed, word4)), Some((Target::NotServed, word6))) =
            (&target4, &target6)
        {
            found.push(
                Diagnostic::error(
                    self.source.position(*word6),
                    "neither family has a target",
                    "an address in column 4 (target_ipv4) or column 6 (target_ipv6)",
                )
                .with(&self.source.position(*word4), "nor here"),
            );
        }
        let place = listen.as_ref().map(|(listen, word)| (listen, *word));
        let target_ports = match in_header {
            true => Some(TargetPorts::One),
            false => self.target_ports(place, port, found),
        };
        if let Some((listen, word)) = place {
            instance_options::check_listen(self.source, (listen, word), cell, &options, found);
        }
        let complete = found.errors() == before && self.cells.len() >= REQUIRED;
        let instance = complete.then_some(()).and_then(|()| {
            let port = match port {
                Some((ports, _)) => ports.first(),
                None if in_header => 0,
                None => return None,
            };
            let (target4, target6) = (target4.as_ref()?, target6.as_ref()?);
            let mut named = NamedTargets::default();
            if let Target::Named(name) = &target4.0 {
                (named.v4, named.port) = (Some(name.clone()), port);
            }
            if let Target::Named(name) = &target6.0 {
                (named.v6, named.port) = (Some(name.clone()), port);
            }
            Some(Instance {
                name: name.clone()?.0,
                mark: Some(mark?.0),
                listen: listen.clone()?.0,
                target4: match target4.0 {
                    Target::Served(addr) => Some(SocketAddrV4::new(addr, port)),
                    Target::Named(_) | Target::NotServed => None,
                },
                target6: match target6.0 {
                    Target::Served(addr) => Some(SocketAddrV6::new(addr, port, 0, 0)),
                    Target::Named(_) | Target::NotServed => None,
                },
                named,
                target_ports: target_ports?,
                options: options.clone(),
            })
        });
        Line {
            name,
            mark,
            listen,
            protocol: options.protocol,
            allow,
            target4_word: target4.map(|(_, word)| word),
            target6_word: target6.map(|(_, word)| word),
            instance,
        }
    }

    /// The columns of the service are empty where the header says where it is.
    fn check_no_target(&self, found: &mut Diagnostics) {
        for column in [columns::TARGET4, columns::PORT, columns::TARGET6] {
            let Some(cell) = self.cells.get(column) else {
                continue;
            };
            if cell.text != "-" && !cell.text.is_empty() {
                found.push(Diagnostic::error(
                    self.source.position(*cell),
                    format!(
                        "column {} ({}) with target=header",
                        column + 1,
                        NAMES[column]
                    ),
                    "-, because the header says where the service is",
                ));
            }
        }
    }

    /// How the ports of the listener go with those of the targets.
    fn target_ports(
        &self,
        listen: Option<(&Listen, Word<'s>)>,
        port: Option<(PortRange, Word<'s>)>,
        found: &mut Diagnostics,
    ) -> Option<TargetPorts> {
        let ((listen, listen_word), (targets, word)) = (listen?, port?);
        if targets.count() == 1 {
            return Some(TargetPorts::One);
        }
        let count = listen.ports().map(|range| range.ports().count());
        if count == Some(targets.count()) {
            return Some(TargetPorts::Parallel);
        }
        let listens = match count {
            None => "a Unix socket has no ports".to_owned(),
            Some(1) => "there is one port to listen on".to_owned(),
            Some(many) => format!("there are {many} ports to listen on"),
        };
        let expected = match count {
            Some(many @ 2..) => format!("one port, or a range of {many}"),
            _ => "one port".to_owned(),
        };
        let complaint = Diagnostic::error(
            self.source.position(word),
            format!("{} target ports, and {listens}", targets.count()),
            expected,
        );
        found.push(complaint.with(&self.source.position(listen_word), "the listen address"));
        None
    }

    /// A column's value and place; an empty cell is a mistake, a missing one has been complained about.
    fn take<T>(
        &self,
        column: usize,
        cell: Option<Tried<T>>,
        found: &mut Diagnostics,
    ) -> Option<(T, Word<'s>)> {
        let word = *self.cells.get(column)?;
        let mistake = match cell {
            Some(Tried(Ok(value))) => return Some((value, word)),
            Some(Tried(Err(mistake))) => Diagnostic::value(self.source.position(word), mistake),
            // no characters to point at: the tab before the gap, or the line
            None => Diagnostic::error(
                self.source.position(self.gap(word)),
                format!("column {} ({}) is empty", column + 1, NAMES[column]),
                columns::EXPECTED[column],
            ),
        };
        found.push(mistake);
        None
    }

    /// The tab before an empty cell.
    fn gap(&self, empty: Word<'s>) -> Word<'s> {
        match empty.start().checked_sub(1) {
            Some(at) if at >= self.content.start() => self.source.word(at..at + 1),
            _ => self.source.word(empty.start()..empty.start() + 1),
        }
    }
}
