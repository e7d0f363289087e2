//! A configuration file as text in which every word knows its place.
//!
//! Owns: reading, UTF-8, lines, words, comments, positions. Must not know: what a word means.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::diagnostics::Diagnostic;

/// The largest file that is read: an allow list of a hundred thousand lines. Whatever is larger was
/// named by mistake (a log, `/dev/zero`).
const MAX_BYTES: u64 = 4 << 20;

/// The longest line, in bytes, for the same reason.
const MAX_LINE: usize = 8 << 10;

const BYTE_ORDER_MARK: char = '\u{feff}';
const BYTE_ORDER_MARK_BYTES: &[u8] = b"\xef\xbb\xbf";

/// A file's text. Bytes that are not UTF-8 stand as U+FFFD: whether they matter depends on where they
/// are, for files of the shell set-up may have Latin-1 in their comments.
#[derive(Debug)]
pub(super) struct Source {
    path: Arc<Path>,
    text: String,
    /// Where in `text` each line begins.
    line_starts: Vec<usize>,
    /// Where in `text` a U+FFFD stands for these bytes, in ascending order.
    undecodable: Vec<(usize, Vec<u8>)>,
}

/// Where something is in a file, with the line's text, so that it can be shown without the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) path: Arc<Path>,
    /// 1-based.
    pub(super) line: usize,
    /// The line without its end.
    pub(super) text: String,
    /// In bytes of `text`.
    pub(super) span: Range<usize>,
}

impl Position {
    /// The column of the first character, 1-based, in characters.
    pub(super) fn column(&self) -> usize {
        self.text[..self.span.start].chars().count() + 1
    }

    /// How many characters are meant.
    pub(super) fn length(&self) -> usize {
        self.text[self.span.clone()].chars().count()
    }
}

/// A piece of a source's text, never across lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Word<'t> {
    pub(super) text: &'t str,
    /// Offset in the source's text.
    start: usize,
}

impl Source {
    /// Reads a file.
    pub(super) fn read(path: PathBuf) -> io::Result<Self> {
        let mut bytes = Vec::new();
        File::open(&path)?
            .take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("larger than {} MiB", MAX_BYTES >> 20),
            ));
        }
        if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "UTF-16 text, UTF-8 is needed",
            ));
        }
        Ok(Self::new(&path, &bytes))
    }

    /// A source of these bytes. Byte-order marks at the very start (Windows editors, and files
    /// put together from theirs) are dropped: csv would drop the second one and shift the columns.
    pub(super) fn new(path: &Path, bytes: &[u8]) -> Self {
        let mut text = String::with_capacity(bytes.len());
        let mut undecodable = Vec::new();
        let mut bytes = bytes;
        while let Some(rest) = bytes.strip_prefix(BYTE_ORDER_MARK_BYTES) {
            bytes = rest;
        }
        for chunk in bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            if !chunk.invalid().is_empty() {
                undecodable.push((text.len(), chunk.invalid().to_vec()));
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        let line_starts = std::iter::once(0)
            .chain(text.match_indices('\n').map(|(at, _)| at + 1))
            .collect();
        Self {
            path: path.into(),
            text,
            line_starts,
            undecodable,
        }
    }

    pub(super) fn path(&self) -> &Arc<Path> {
        &self.path
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The piece of text in this range.
    pub(super) fn word(&self, range: Range<usize>) -> Word<'_> {
        Word {
            text: &self.text[range.clone()],
            start: range.start,
        }
    }

    /// The lines with their ends (LF, CRLF) cut off.
    pub(super) fn lines(&self) -> impl Iterator<Item = Word<'_>> {
        let mut start = 0;
        self.text.split_inclusive('\n').map(move |line| {
            let word = Word { text: line, start };
            start += line.len();
            word.end_trimmed_of("\n").end_trimmed_of("\r")
        })
    }

    /// Where a word is.
    pub(super) fn position(&self, word: Word<'_>) -> Position {
        // the first line begins at 0, so there is always one that begins at or before the word
        let line = self.line_starts.partition_point(|at| *at <= word.start);
        let line_start = self.line_starts[line - 1];
        let line_end = self.line_starts.get(line).copied();
        let text = &self.text[line_start..line_end.unwrap_or(self.text.len())];
        let text = text.strip_suffix('\n').unwrap_or(text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        let start = word.start - line_start;
        Position {
            path: Arc::clone(&self.path),
            line,
            text: text.to_owned(),
            span: start..start + word.text.len(),
        }
    }

    /// What keeps a line from being looked at more closely: it is endless, or has characters in it
    /// that no value has and no eye sees. At the first of them.
    pub(super) fn unreadable(&self, content: Word<'_>) -> Option<Diagnostic> {
        if content.text.len() > MAX_LINE {
            let line = self.line_starts.partition_point(|at| *at <= content.start);
            return Some(Diagnostic::error(
                &self.path,
                format!("line {line} is longer than {MAX_LINE} bytes"),
                "the configuration, not another file",
            ));
        }
        self.invisible(content)
    }

    /// Bytes that are not UTF-8, control characters, exotic spaces.
    fn invisible(&self, word: Word<'_>) -> Option<Diagnostic> {
        let first = self.undecodable.partition_point(|(at, _)| *at < word.start);
        let undecodable = self
            .undecodable
            .get(first)
            .filter(|(at, _)| *at < word.start + word.text.len());
        let character = word
            .text
            .char_indices()
            .map(|(at, c)| (word.start + at, c))
            .find(|(_, c)| is_invisible(*c));
        let (at, problem) = match (undecodable, character) {
            (Some((at, bytes)), other) if other.is_none_or(|(other, _)| *at < other) => {
                (*at, format!("{} is not UTF-8", hexadecimal(bytes)))
            }
            (_, Some((at, c))) => (at, format!("invisible {}", described(c))),
            (_, None) => return None,
        };
        let width = self.text[at..].chars().next().map_or(0, char::len_utf8);
        Some(Diagnostic::error(
            self.position(self.word(at..at + width)),
            problem,
            "printable text in UTF-8",
        ))
    }
}

fn is_invisible(c: char) -> bool {
    (c.is_control() && c != '\t')
        || (c.is_whitespace() && !c.is_ascii())
        // zero-width characters, direction marks, soft hyphen: what copying from web pages brings along
        || matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || c == BYTE_ORDER_MARK
}

fn described(c: char) -> String {
    let name = match c {
        '\0' => " (NUL)",
        '\r' => " (carriage return)",
        '\u{1b}' => " (escape)",
        '\u{a0}' => " (no-break space)",
        '\u{200b}' => " (zero-width space)",
        BYTE_ORDER_MARK => " (byte-order mark)",
        _ => "",
    };
    format!("character U+{:04X}{name}", u32::from(c))
}

fn hexadecimal(bytes: &[u8]) -> String {
    let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:#04x}")).collect();
    let noun = if bytes.len() == 1 { "byte" } else { "bytes" };
    format!("{noun} {}", digits.join(" "))
}

impl<'t> Word<'t> {
    /// Where it begins in the source's text.
    pub(super) fn start(self) -> usize {
        self.start
    }

    /// A part of it, in bytes from its own beginning.
    pub(super) fn part(self, range: Range<usize>) -> Word<'t> {
        Word {
            text: &self.text[range.clone()],
            start: self.start + range.start,
        }
    }

    fn end_trimmed_of(self, suffix: &str) -> Word<'t> {
        let text = self.text.strip_suffix(suffix).unwrap_or(self.text);
        Word { text, ..self }
    }

    /// Without spaces, tabs and carriage returns at its ends.
    pub(super) fn trimmed(self) -> Word<'t> {
        let blank = [' ', '\t', '\r'];
        let text = self.text.trim_end_matches(blank);
        let lead = text.len() - text.trim_start_matches(blank).len();
        Word { text, ..self }.part(lead..text.len())
    }

    /// What stands before the first `#`, trimmed.
    pub(super) fn before_comment(self) -> Word<'t> {
        let end = self.text.find('#').unwrap_or(self.text.len());
        self.part(0..end).trimmed()
    }

    /// The pieces between these characters, the empty ones too.
    pub(super) fn split(self, at: impl Fn(char) -> bool + Copy) -> impl Iterator<Item = Word<'t>> {
        let base = self.start;
        let mut start = 0;
        self.text
            .split_inclusive(at)
            // split_inclusive has no last piece behind a separator at the end
            .chain((self.text.is_empty() || self.text.ends_with(at)).then_some(""))
            .map(move |piece| {
                let text = piece.strip_suffix(at).unwrap_or(piece);
                let word = Word {
                    text,
                    start: base + start,
                };
                start += piece.len();
                word
            })
    }

    /// The words between spaces and tabs.
    pub(super) fn words(self) -> impl Iterator<Item = Word<'t>> {
        self.split(|c| c == ' ' || c == '\t')
            .filter(|word| !word.text.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(bytes: &[u8]) -> Source {
        Source::new(Path::new("file"), bytes)
    }

    #[test]
    fn lines_of_every_ending() {
        let source = source(b"\xef\xbb\xbfone\r\n\ntwo \n three");
        let lines: Vec<&str> = source.lines().map(|line| line.text).collect();
        assert_eq!(lines, ["one", "", "two ", " three"]);
        let third = source.lines().nth(3).unwrap().trimmed();
        let position = source.position(third);
        assert_eq!(
            (position.line, position.column(), position.length()),
            (4, 2, 5)
        );
    }

    #[test]
    fn columns_count_characters() {
        let source = source("ä\tb".as_bytes());
        let line = source.lines().next().unwrap();
        let last = line.words().last().unwrap();
        assert_eq!(source.position(last).column(), 3);
    }

    #[test]
    fn pieces_and_words() {
        let source = source(b",a,,b,");
        let line = source.lines().next().unwrap();
        let pieces: Vec<(usize, &str)> = line
            .split(|c| c == ',')
            .map(|word| (word.start(), word.text))
            .collect();
        assert_eq!(pieces, [(0, ""), (1, "a"), (3, ""), (4, "b"), (6, "")]);
    }

    #[test]
    fn invisible_characters_are_named() {
        for (bytes, problem) in [
            (&b"1\xfc3"[..], "byte 0xfc is not UTF-8"),
            (b"1\xe2\x82", "bytes 0xe2 0x82 is not UTF-8"),
            (b"1\x003", "invisible character U+0000 (NUL)"),
            (b"1\xc2\xa03", "invisible character U+00A0 (no-break space)"),
            (
                b"1\xef\xbb\xbf",
                "invisible character U+FEFF (byte-order mark)",
            ),
            (b"1\r2", "invisible character U+000D (carriage return)"),
        ] {
            let source = source(bytes);
            let line = source.lines().next().unwrap();
            let found = source.invisible(line).unwrap();
            assert_eq!(found.problem(), problem);
        }
        let latin1_comment = source(b"123 # M\xfcller");
        let line = latin1_comment.lines().next().unwrap();
        assert!(latin1_comment.invisible(line.before_comment()).is_none());
        assert!(latin1_comment.invisible(line).is_some());
    }
}
