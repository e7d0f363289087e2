//! From what was found to the text of pathways.conf and instances.tsv.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::SocketAddr;

use super::{Draft, Entry, Hints, Meaning};
use crate::model::{Mark, Pathway, Protocol};

/// The mark of relays that had none; what the READMEs of all ancestors use as a table.
const MARK: u32 = 123;

/// The two files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// pathways.conf.
    pub pathways: String,
    /// instances.tsv.
    pub instances: String,
    /// How many relays there are.
    pub relays: usize,
}

/// Writes what was found as the two files.
pub fn write(entries: &[Entry], hints: &Hints) -> Files {
    let mut writer = Writer {
        default_mark: default_mark(hints),
        names: BTreeSet::new(),
        places: BTreeMap::new(),
        marks: BTreeSet::new(),
        text: "# name\tfwmark\tlisten_addr\ttarget_ipv4\ttarget_port\ttarget_ipv6\toptions\n"
            .to_owned(),
        relays: 0,
    };
    for entry in entries {
        writer.entry(entry);
    }
    let mut pathways = "# one firewall mark for each proxy in front of this host\n".to_owned();
    for mark in &writer.marks {
        // a mark that is a system table's number needs a table of its own
        match Pathway::with_defaults(*mark) {
            Some(_) => _ = writeln!(pathways, "{mark}"),
            None => _ = writeln!(pathways, "{mark} table={}", u64::from(mark.get()) + 1000),
        }
    }
    Files {
        pathways,
        instances: writer.text,
        relays: writer.relays,
    }
}

/// The table of the old routing, which people know, where there is one.
fn default_mark(hints: &Hints) -> Mark {
    let tables = hints.tables.iter().copied();
    let usable = tables
        .filter_map(Mark::new)
        .find(|mark| Pathway::with_defaults(*mark).is_some());
    usable.unwrap_or_else(|| Mark::new(MARK).expect("it is not 0"))
}

struct Writer {
    default_mark: Mark,
    names: BTreeSet<String>,
    /// Who listens where.
    places: BTreeMap<(Protocol, SocketAddr), String>,
    marks: BTreeSet<Mark>,
    text: String,
    relays: usize,
}

impl Writer {
    fn entry(&mut self, entry: &Entry) {
        let place = match entry.line {
            Some(line) => format!("{}:{line}", entry.source),
            None => entry.source.clone(),
        };
        self.comment(&format!("{place}: {}", entry.text), "\n# ");
        match &entry.meaning {
            Meaning::Note(note) => self.comment(note, "#   "),
            Meaning::Relays(drafts) => {
                let notes = drafts.first().map(|draft| draft.notes.as_slice());
                for note in notes.unwrap_or_default() {
                    self.comment(note, "#   ");
                }
                for draft in drafts {
                    self.draft(draft);
                }
            }
        }
    }

    /// Whatever is in it, a comment stays one line.
    fn comment(&mut self, text: &str, lead: &str) {
        let text: String = text
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        _ = writeln!(self.text, "{lead}{text}");
    }

    fn draft(&mut self, draft: &Draft) {
        let key = (draft.options.protocol, draft.listen);
        if let Some(other) = self.places.get(&key) {
            let note = format!("left out: {other} listens on {} already", draft.listen);
            return self.comment(&note, "#   ");
        }
        let mark = draft.mark.unwrap_or_else(|| {
            let note = format!("it had no mark: {} from now on", self.default_mark);
            self.comment(&note, "#   ");
            self.default_mark
        });
        let port4 = draft.target4.map(|target| target.port());
        let port6 = draft.target6.map(|target| target.port());
        let Some(port) = port4.or(port6) else {
            return self.comment("left out: it leads nowhere", "#   ");
        };
        let target4 = draft
            .target4
            .map_or("-".to_owned(), |target| target.ip().to_string());
        let mut target6 = draft
            .target6
            .map_or("-".to_owned(), |target| target.ip().to_string());
        if let Some(other) = port6.filter(|other| *other != port) {
            let note = format!(
                "IPv6 clients went to port {other}, and a line has one port: they need an address of their own here"
            );
            self.comment(&note, "#   ");
            target6 = "-".to_owned();
        }
        let name = self.name(&draft.name, draft.listen);
        self.places.insert(key, name.clone());
        self.marks.insert(mark);
        self.relays += 1;
        let mut line = format!(
            "{name}\t{mark}\t{}\t{target4}\t{port}\t{target6}",
            draft.listen
        );
        let options = draft.options.to_string();
        if !options.is_empty() {
            line.push('\t');
            line.push_str(&options);
        }
        _ = writeln!(self.text, "{line}");
    }

    /// A name that systemd can carry and nobody else has.
    fn name(&mut self, wish: &str, listen: SocketAddr) -> String {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let mut base: String = wish
            .chars()
            .map(|c| if allowed(c) { c } else { '-' })
            .take(48)
            .collect();
        base = base.trim_start_matches(['.', '_', '-']).to_owned();
        if base.is_empty() {
            base.push_str("relay");
        }
        let mut name = base.clone();
        if self.names.contains(&name) && listen.is_ipv6() {
            name = format!("{base}-v6");
        }
        let mut number = 2;
        while !self.names.insert(name.clone()) {
            name = format!("{base}-{number}");
            number += 1;
        }
        name
    }
}
