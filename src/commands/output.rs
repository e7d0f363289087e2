//! How results look on stdout: tables for a person, JSON for a program.

use std::io::{self, StdoutLock, Write};

use comfy_table::{Table, presets};
use serde::Serialize;

/// Stdout for results. Once its reader has gone (`| head`), the rest is dropped: the verb has done its
/// work and keeps its exit code. A full disk is an error all the same.
#[derive(Debug)]
pub(super) struct Results {
    out: StdoutLock<'static>,
    unread: bool,
}

/// Where results are written.
pub(super) fn results() -> Results {
    Results {
        out: io::stdout().lock(),
        unread: false,
    }
}

impl Results {
    /// Whether nobody reads any more.
    pub(super) fn are_unread(&self) -> bool {
        self.unread
    }

    fn unless_unread<T>(&mut self, outcome: io::Result<T>, instead: T) -> io::Result<T> {
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.unread = true;
                Ok(instead)
            }
            outcome => outcome,
        }
    }
}

impl Write for Results {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let outcome = self.out.write(bytes);
        self.unless_unread(outcome, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let outcome = self.out.flush();
        self.unless_unread(outcome, ())
    }
}

/// One JSON value and a newline.
pub(super) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = results();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}

/// A table without borders.
pub(super) fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

/// The table without the blanks that pad its last column, and its left edge.
pub(super) fn trimmed(table: &Table) -> String {
    let lines: Vec<String> = table
        .lines()
        .map(|line| {
            line.strip_prefix(' ')
                .unwrap_or(&line)
                .trim_end()
                .to_owned()
        })
        .collect();
    lines.join("\n")
}
