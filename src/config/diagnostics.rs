//! Mistakes and warnings, shown with file, line, column, the line's text, a caret and what was expected.
//!
//! Owns: the list, its order, its text and JSON forms. Must not know: what was parsed.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};
use serde::ser::{Serialize, SerializeStruct, Serializer};

use super::source::Position;
use crate::model::ValueError;

/// How many mistakes, and how many warnings, are kept; the rest is counted. A wrong file (a binary as
/// the allow list) has a mistake on every line.
const MAX_KEPT: usize = 200;

/// Whether it keeps the configuration from being used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It does.
    Error,
    /// It does not, and someone should know.
    Warning,
}

/// One mistake or warning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    severity: Severity,
    place: Place,
    problem: String,
    expected: String,
    /// Other places that explain it, each with what is there. They follow the main one in the text.
    related: Vec<(Position, String)>,
}

/// What a diagnostic is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// A file as a whole.
    File(Arc<Path>),
    /// Part of a line.
    Span(Position),
}

impl From<Position> for Place {
    fn from(position: Position) -> Self {
        Self::Span(position)
    }
}

impl From<&Position> for Place {
    fn from(position: &Position) -> Self {
        Self::Span(position.clone())
    }
}

impl From<&Arc<Path>> for Place {
    fn from(path: &Arc<Path>) -> Self {
        Self::File(Arc::clone(path))
    }
}

impl Diagnostic {
    /// A mistake; `expected` reads as the end of "expected …".
    pub(super) fn error(
        place: impl Into<Place>,
        problem: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self {
            severity: Severity::Error,
            place: place.into(),
            problem: problem.into(),
            expected: expected.into(),
            related: Vec::new(),
        }
    }

    /// A warning; `expected` reads as the end of "expected …".
    pub(super) fn warning(
        place: impl Into<Place>,
        problem: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self {
            severity: Severity::Warning,
            ..Self::error(place, problem, expected)
        }
    }

    /// A text that is no value.
    pub(super) fn value(place: impl Into<Place>, mistake: ValueError) -> Self {
        Self::error(place, mistake.problem, mistake.expected)
    }

    /// Shows another place too.
    pub(super) fn with(mut self, position: &Position, what: impl Into<String>) -> Self {
        self.related.push((position.clone(), what.into()));
        self
    }

    /// Whether it keeps the configuration from being used.
    pub fn severity(&self) -> Severity {
        self.severity
    }

    /// What is wrong.
    pub fn problem(&self) -> &str {
        &self.problem
    }

    /// The file.
    pub fn path(&self) -> &Path {
        match &self.place {
            Place::File(path) => path,
            Place::Span(position) => &position.path,
        }
    }

    /// The line, 1-based; none where the file as a whole is meant.
    pub fn line(&self) -> Option<usize> {
        match &self.place {
            Place::File(_) => None,
            Place::Span(position) => Some(position.line),
        }
    }

    fn draw(&self, renderer: &Renderer) -> String {
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let group = Group::with_title(level.primary_title(self.problem.as_str()));
        let expected = format!("expected {}", self.expected);
        let mut group = match &self.place {
            Place::File(path) => group
                .element(Origin::path(path.to_string_lossy()))
                .element(Level::HELP.message(expected)),
            Place::Span(position) => {
                let same_line = self
                    .related
                    .iter()
                    .filter(|(other, _)| same_line(other, position))
                    .map(|(other, what)| {
                        AnnotationKind::Context
                            .span(other.span.clone())
                            .label(what.as_str())
                    });
                group.element(
                    excerpt(position)
                        .annotation(
                            AnnotationKind::Primary
                                .span(position.span.clone())
                                .label(expected),
                        )
                        .annotations(same_line),
                )
            }
        };
        for (other, what) in &self.related {
            if !matches!(&self.place, Place::Span(position) if same_line(other, position)) {
                group = group.element(
                    excerpt(other).annotation(
                        AnnotationKind::Context
                            .span(other.span.clone())
                            .label(what.as_str()),
                    ),
                );
            }
        }
        renderer.render(&[group])
    }
}

fn same_line(one: &Position, other: &Position) -> bool {
    one.path == other.path && one.line == other.line
}

fn excerpt(position: &Position) -> Snippet<'_, annotate_snippets::Annotation<'_>> {
    Snippet::source(position.text.as_str())
        .line_start(position.line)
        .path(position.path.to_string_lossy())
}

impl Serialize for Diagnostic {
    /// `severity`, `file`, `line`, `column` and `length` in characters (null for a file as a whole),
    /// `problem`, `expected`, and `related` places, each with `file`, `line`, `column`, `what`.
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(serde::Serialize)]
        struct Related<'d> {
            file: std::borrow::Cow<'d, str>,
            line: usize,
            column: usize,
            what: &'d str,
        }
        let span = match &self.place {
            Place::File(_) => None,
            Place::Span(position) => Some(position),
        };
        let related: Vec<Related<'_>> = self
            .related
            .iter()
            .map(|(position, what)| Related {
                file: position.path.to_string_lossy(),
                line: position.line,
                column: position.column(),
                what,
            })
            .collect();
        let mut object = to.serialize_struct("Diagnostic", 8)?;
        object.serialize_field("severity", &self.severity)?;
        object.serialize_field("file", &self.path().to_string_lossy())?;
        object.serialize_field("line", &span.map(|position| position.line))?;
        object.serialize_field("column", &span.map(Position::column))?;
        object.serialize_field("length", &span.map(Position::length))?;
        object.serialize_field("problem", &self.problem)?;
        object.serialize_field("expected", &self.expected)?;
        object.serialize_field("related", &related)?;
        object.end()
    }
}

/// Everything that was found in all files. As an error: nothing of the configuration may be used.
///
/// `Display` is plain text; [`Diagnostics::draw`] can colour it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Diagnostics {
    kept: Vec<Diagnostic>,
    errors: usize,
    warnings: usize,
}

impl Diagnostics {
    /// Adds those of another list.
    pub(super) fn extend(&mut self, others: Self) {
        for diagnostic in others.iter() {
            self.push(diagnostic.clone());
        }
    }

    pub(super) fn push(&mut self, diagnostic: Diagnostic) {
        let count = match diagnostic.severity {
            Severity::Error => &mut self.errors,
            Severity::Warning => &mut self.warnings,
        };
        *count += 1;
        if *count <= MAX_KEPT {
            self.kept.push(diagnostic);
        }
    }

    /// Each of them, by file, then by line.
    pub fn iter(&self) -> std::slice::Iter<'_, Diagnostic> {
        self.kept.iter()
    }

    /// Whether there is none, not even a warning.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// How many mistakes there are, warnings not counted.
    pub fn errors(&self) -> usize {
        self.errors
    }

    /// Puts them in the order of the files as they were first complained about, then of the lines.
    pub(super) fn sorted(mut self) -> Self {
        let mut files: Vec<std::path::PathBuf> = Vec::new();
        for diagnostic in &self.kept {
            if !files.iter().any(|file| file == diagnostic.path()) {
                files.push(diagnostic.path().to_owned());
            }
        }
        self.kept.sort_by_key(|diagnostic| {
            let file = files.iter().position(|file| file == diagnostic.path());
            match &diagnostic.place {
                Place::File(_) => (file, 0, 0),
                Place::Span(position) => (file, position.line, position.span.start),
            }
        });
        self
    }

    /// All of them as text, in colour for a terminal; ends with a line that counts the mistakes, if any.
    pub fn draw(&self, colour: bool) -> String {
        let renderer = if colour {
            Renderer::styled()
        } else {
            Renderer::plain()
        };
        let mut text = String::new();
        for diagnostic in &self.kept {
            text.push_str(&diagnostic.draw(&renderer));
            text.push_str("\n\n");
        }
        let more = self.errors + self.warnings - self.kept.len();
        if more > 0 {
            text.push_str(&format!("… and {more} more\n\n"));
        }
        let mistakes = match self.errors() {
            0 => String::new(),
            1 => "1 mistake in the configuration".to_owned(),
            count => format!("{count} mistakes in the configuration"),
        };
        if !mistakes.is_empty() {
            let title = format!("{mistakes}: nothing was started, nothing was changed");
            let summary = Group::with_title(Level::ERROR.primary_title(title));
            text.push_str(&renderer.render(&[summary]));
        }
        text.trim_end().to_owned()
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.draw(false))
    }
}

impl std::error::Error for Diagnostics {}

impl Serialize for Diagnostics {
    /// The list of those that are kept.
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.kept.serialize(to)
    }
}
