//! Allow lists: trusted proxies, one address or prefix a line.
//!
//! Owns: the lines, and that a list with nothing in it is a mistake. Must not know: whose list it is.

use super::diagnostics::{Diagnostic, Diagnostics};
use super::source::{Source, Word};
use crate::model::{AllowList, parse_prefix};

/// What a list without addresses could be taken for, and is not.
pub(super) const EVERYONE: &str = "everyone is 0.0.0.0/0 and ::/0, written out";

/// Reads the file; `None` when it has a mistake, which is then in `found`.
pub(super) fn parse(source: &Source, found: &mut Diagnostics) -> Option<AllowList> {
    let before = found.errors();
    let mut prefixes = Vec::new();
    let lines = source
        .lines()
        .map(Word::before_comment)
        .filter(|content| !content.text.is_empty());
    for content in lines {
        if let Some(diagnostic) = source.unreadable(content) {
            found.push(diagnostic);
            continue;
        }
        if content.words().nth(1).is_some() || content.text.contains(',') {
            found.push(Diagnostic::error(
                source.position(content),
                "more than one word on a line",
                "one address or prefix a line, a comment behind '#'",
            ));
            continue;
        }
        match parse_prefix(content.text) {
            Ok(prefix) => {
                if prefix.prefix_len() == 0 {
                    found.push(Diagnostic::warning(
                        source.position(content),
                        format!("{prefix} lets everyone who can connect claim to be any client"),
                        "the proxies' own addresses, unless a firewall keeps everyone else away",
                    ));
                } else if prefix != prefix.trunc() {
                    found.push(Diagnostic::warning(
                        source.position(content),
                        format!("{prefix} has bits set behind its length"),
                        prefix.trunc().to_string(),
                    ));
                }
                prefixes.push(prefix);
            }
            Err(mistake) => found.push(Diagnostic::error(
                source.position(content),
                mistake.problem,
                format!("{}; {EVERYONE}", mistake.expected),
            )),
        }
    }
    if found.errors() > before {
        return None;
    }
    let list = AllowList::new(prefixes);
    if list.is_none() {
        found.push(Diagnostic::error(
            source.path(),
            "the allow list is empty, so no proxy could connect",
            format!("at least one trusted proxy's address; {EVERYONE}"),
        ));
    }
    list
}
