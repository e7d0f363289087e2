//! The flags: how they are spelled, and what a whole command line means.
//!
//! Syntax is Go's (`-l X`, `--l X`, `-l=X`, numbers as Go writes them), and beyond it what getopt users
//! typed: `-l0.0.0.0:2222`, `-qv`. All families' spellings are understood under both names, because which
//! program a unit meant by `mmproxy` cannot be told; where they contradict each other, the value decides
//! (`-c 60` against `-c FILE`, `-v 1` against a bare `-v`).

mod meaning;
mod spelling;
#[cfg(test)]
mod tests;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use super::OldName;
use super::listen::Place;
use crate::model::{Mark, PortPolicy, Protocol, TableId};

/// What a command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// The list of flags.
    Help,
    /// The version.
    Version,
    /// `-c FILE`: everything is in a JSON file.
    Json(PathBuf),
    /// One relay.
    Relay(Box<Relay>),
}

/// One relay as the flags describe it, defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// Whose flags these are, as far as it can be told.
    pub ancestor: Ancestor,
    /// Where it listens.
    pub listen: Place,
    /// Where IPv4 clients go.
    pub target4: Place,
    /// Where IPv6 clients go.
    pub target6: Place,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The mark on connections to the target.
    pub mark: Option<Mark>,
    /// How many sockets share the listen address.
    pub listeners: NonZeroU32,
    /// When a silent UDP flow ends.
    pub close_after: Duration,
    /// The file with the proxies that are believed; without it everyone is.
    pub allow: Option<PathBuf>,
    /// 0, 1 or 2.
    pub verbosity: u8,
    /// Whether the client's port is kept.
    pub port: PortPolicy,
    /// Whether the header names the target.
    pub destination: Destination,
    /// How the listening socket is made.
    pub listening: Listening,
    /// The routing table to suggest at the start, where suggestions are wanted.
    pub suggest: Option<TableId>,
    /// What the caller should know about the command line.
    pub notes: Vec<String>,
}

/// Whose flags were used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ancestor {
    /// path-network's or kzemek's go-mmproxy, or nothing that tells.
    Go,
    /// mmproxy-rs.
    Rust,
    /// cloudflare/mmproxy.
    Cloudflare,
}

/// Where connections go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Destination {
    /// To the targets.
    #[default]
    Targets,
    /// To the destination in the PROXY header (`-dynamic-destination`).
    Header,
}

/// How the listening socket is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Listening {
    /// On its address.
    #[default]
    Plain,
    /// With `IP_TRANSPARENT`, for connections that TPROXY brings (`-listen-transparent`).
    Transparent,
}

/// What is wrong with a command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}: {fix}")]
pub struct FlagError {
    problem: String,
    fix: String,
}

impl FlagError {
    fn new(problem: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            problem: problem.into(),
            fix: fix.into(),
        }
    }
}

/// Reads a command line, without the program's own name.
///
/// # Errors
/// The first mistake, with what to write instead.
pub fn parse(name: OldName, words: &[String]) -> Result<Invocation, FlagError> {
    meaning::of(name, &spelling::read(name, words)?)
}

/// The same command line with `-l` before `-mark`, where both are there the other way round.
///
/// Start scripts find a running relay by the pattern `go-mmproxy.*-l ADDR.*-mark MARK`, and start it with
/// the two the other way round.
pub fn listen_before_mark(name: OldName, words: &[String]) -> Option<Vec<String>> {
    spelling::in_order(&spelling::read(name, words).ok()?).filter(|ordered| ordered != words)
}

/// The flags for a person.
pub fn help(name: OldName) -> String {
    let mut text = format!(
        "mmproxyctl {}, called as {name}: the flags of go-mmproxy, its forks, mmproxy-rs and\n\
         cloudflare/mmproxy. mmproxyctl(1) has more to offer: see mmproxyctl import.\n\n\
         Usage: {name} [flags]\n\n",
        env!("CARGO_PKG_VERSION"),
        name = name.name(),
    );
    for (flag, what) in spelling::HELP {
        text.push_str(&format!("  {flag}\n      {what}\n"));
    }
    text
}

/// The same as a page of the manual.
pub fn page(name: OldName) -> String {
    // a dash of a flag is no hyphen, and a line must not begin with a dot
    let plain = |text: &str| text.replace('\\', "\\e").replace('-', "\\-");
    let mut text = format!(
        ".TH {name} 1 \"\" \"mmproxyctl {}\"\n.SH NAME\n{shown} \\- mmproxyctl by its old name\n.SH SYNOPSIS\n\
         .B {shown}\n[\\fIflags\\fR]\n.SH DESCRIPTION\nOne relay from PROXY protocol to a service that sees the \
         client's address, told by the flags of go\\-mmproxy and its forks, mmproxy\\-rs and cloudflare/mmproxy. \
         A flag may have one dash or two, and its value behind a space or =.\n.SH OPTIONS\n",
        env!("CARGO_PKG_VERSION"),
        name = name.name(),
        shown = plain(name.name()),
    );
    for (flag, what) in spelling::HELP {
        text.push_str(&format!(".TP\n\\fB{}\\fR\n{}\n", plain(flag), plain(what)));
    }
    text.push_str(
        ".SH EXIT STATUS\n0 stopped by a signal, 1 it failed, 2 the flags or a file are wrong.\n\
         .SH SEE ALSO\n.BR mmproxyctl (1),\n.BR mmproxyctl\\-import (1)\n",
    );
    text
}
