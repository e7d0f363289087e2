//! `key=value` words, as pathways.conf and instances.tsv have them.

use std::collections::BTreeMap;

use super::diagnostics::{Diagnostic, Diagnostics};
use super::source::{Source, Word};
use crate::model::ValueError;

/// The options of one line, each known and given once.
pub(super) struct Options<'s> {
    source: &'s Source,
    given: BTreeMap<&'static str, Given<'s>>,
}

#[derive(Clone, Copy)]
struct Given<'s> {
    whole: Word<'s>,
    value: Word<'s>,
}

impl<'s> Options<'s> {
    /// Takes words apart; what is unknown, given twice or no `key=value` is a mistake. Each word comes
    /// with the text it is from, to be pointed at where the word is empty.
    pub(super) fn new(
        source: &'s Source,
        words: impl IntoIterator<Item = (Word<'s>, Word<'s>)>,
        known: &[&'static str],
        found: &mut Diagnostics,
    ) -> Self {
        let mut given: BTreeMap<&'static str, Given<'s>> = BTreeMap::new();
        let list = || format!("{}=", known.join("=, "));
        for (whole, around) in words {
            let text = whole.text;
            if text.is_empty() {
                found.push(Diagnostic::error(
                    source.position(around),
                    "nothing between two commas, or behind the last",
                    "key=value words with one comma between them",
                ));
                continue;
            }
            if text.contains([' ', '\t']) {
                found.push(Diagnostic::error(
                    source.position(whole),
                    "a space in an option",
                    "key=value words with one comma between them",
                ));
                continue;
            }
            let Some(equals) = text.find('=') else {
                found.push(Diagnostic::error(
                    source.position(whole),
                    format!("'{text}' is not an option"),
                    format!("key=value, the key one of {}", list()),
                ));
                continue;
            };
            let key = whole.part(0..equals);
            let value = whole.part(equals + 1..text.len());
            let Some(name) = known.iter().find(|name| **name == key.text) else {
                found.push(Diagnostic::error(
                    source.position(key),
                    format!("unknown option '{}'", key.text),
                    format!("one of {}", list()),
                ));
                continue;
            };
            match given.get(name) {
                None => {
                    given.insert(name, Given { whole, value });
                }
                Some(first) => found.push(
                    Diagnostic::error(
                        source.position(whole),
                        format!("option {name}= is given twice"),
                        format!("{name}= once"),
                    )
                    .with(&source.position(first.whole), "first here"),
                ),
            }
        }
        Self { source, given }
    }

    /// The whole word of an option, `key=value`.
    pub(super) fn word(&self, key: &str) -> Option<Word<'s>> {
        self.given.get(key).map(|given| given.whole)
    }

    /// The text behind `key=`.
    pub(super) fn text(&self, key: &str) -> Option<Word<'s>> {
        self.given.get(key).map(|given| given.value)
    }

    /// The value of an option; a mistake counts as not given.
    pub(super) fn value<T>(
        &self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, ValueError>,
        found: &mut Diagnostics,
    ) -> Option<T> {
        let Given { whole, value } = *self.given.get(key)?;
        match parse(value.text) {
            Ok(parsed) => Some(parsed),
            Err(mistake) => {
                // an empty value has no characters to point at
                let at = if value.text.is_empty() { whole } else { value };
                found.push(Diagnostic::value(self.source.position(at), mistake));
                None
            }
        }
    }
}
