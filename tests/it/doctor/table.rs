//! The generated parts of docs/doctor.md: made from what the tests saw, and checked to be current.

use std::path::Path;

use mmproxyctl::demo::clinic::ills::Ill;
use mmproxyctl::doctor::{Diagnosis, Severity};

/// One line of the table.
pub(crate) struct Row {
    what: String,
    fault: String,
    verdict: String,
    fix: String,
}

impl Row {
    /// What was done, what the doctor said first, and what mended it.
    pub(crate) fn of(ill: &Ill, diagnoses: &[Diagnosis], config: &Path) -> Self {
        let first = diagnoses.iter().find(|one| one.severity == Severity::Fault);
        let first = first.expect("a fault");
        let usual = |text: &str| usual(text, config);
        let mut fix: Vec<String> = first
            .fix
            .commands
            .iter()
            .map(|command| format!("`{}`", usual(command)))
            .collect();
        if let (Some(on), Some(first)) = (first.fix.on, fix.first_mut()) {
            *first = format!("on {on}: {first}");
        }
        if fix.is_empty() {
            fix.extend(first.fix.advice.as_deref().map(usual));
        }
        Self {
            what: ill.what.clone(),
            fault: ill.fault.to_owned(),
            verdict: usual(&first.verdict),
            fix: fix.join("<br>"),
        }
    }
}

/// Without what differs from run to run, and from machine to machine.
fn usual(text: &str, config: &Path) -> String {
    let text = text.replace(&config.display().to_string(), "/etc/mmproxy");
    let text = with_number(&text, "pid ", "4711");
    let text = with_number(&text, "--nofile=", "1048576");
    with_number(&text, "--nofile=1048576:", "1048576")
}

/// Puts another number behind a word, wherever it stands.
fn with_number(text: &str, word: &str, number: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(word) {
        let tail = after.trim_start_matches(|c: char| c.is_ascii_digit());
        out.push_str(before);
        out.push_str(word);
        // a word without a number is another one
        out.push_str(if tail.len() < after.len() { number } else { "" });
        rest = tail;
    }
    out + rest
}

/// The table of faults.
pub(crate) fn of_faults(rows: &[Row]) -> String {
    let mut text = String::from(
        "| what was done to a host that worked | fault | verdict | what mended it; then `doctor` said healthy |\n|---|---|---|---|\n",
    );
    for row in rows {
        // a bar ends a cell, also in code
        let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
        text.push_str(&format!(
            "| {} | `{}` | {} | {} |\n",
            cell(&row.what),
            row.fault,
            cell(&row.verdict),
            cell(&row.fix)
        ));
    }
    text
}

/// Compares a generated part of docs/doctor.md with what it should be; with `UPDATE_DOCS=1` it is written.
pub(crate) fn assert_current(part: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/doctor.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (begin, end) = (
        format!("<!-- {part}: made by the tests -->\n"),
        format!("<!-- end of {part} -->"),
    );
    let (before, rest) = text.split_once(&begin).expect("the part's begin");
    let (now, after) = rest.split_once(&end).expect("the part's end");
    if now == expected {
        return;
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, format!("{before}{begin}{expected}{end}{after}")).unwrap();
        return;
    }
    let differing: Vec<_> = expected
        .lines()
        .filter(|line| !now.contains(line))
        .collect();
    panic!(
        "docs/doctor.md is not current; UPDATE_DOCS=1 cargo test --test it -- doctor writes it. New:\n{}",
        differing.join("\n")
    );
}
