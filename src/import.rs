//! What people run today, as the two files: command lines, systemd units, Docker compose, the JSON file.
//!
//! Pure: texts in, the files' text out, with a comment for each source line. Must not know: where texts are
//! read, what is in the kernel.

mod compose;
mod files;
#[cfg(test)]
mod tests;
mod unit;

use std::path::{Path, PathBuf};

use crate::compat::{self, Ancestor, Destination, Invocation, Listening, OldName, Place};
use crate::config::JsonForm;
use crate::model::{InstanceOptions, ListenMode, Mark, PortPolicy, Protocol};

pub use compose::compose;
pub use files::{Files, write};
pub use unit::unit;

/// Reads a file that a source refers to; none where it is not there.
pub type ReadFile<'r> = &'r dyn Fn(&Path) -> Option<String>;

/// What was found in one source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Relays, and lines about which a person has to decide.
    pub entries: Vec<Entry>,
    /// JSON files that command lines name.
    pub json_files: Vec<PathBuf>,
    /// What the source does to the kernel by itself.
    pub hints: Hints,
}

/// Marks and tables that old routing used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hints {
    /// Firewall marks.
    pub marks: Vec<u32>,
    /// Routing tables.
    pub tables: Vec<u32>,
}

/// One source line and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file, or "command line".
    pub source: String,
    /// 1-based; none for a command line.
    pub line: Option<usize>,
    /// The line as it stands there.
    pub text: String,
    /// What it is.
    pub meaning: Meaning,
}

/// What a source line is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meaning {
    /// Relays, one for each address that is listened on.
    Relays(Vec<Draft>),
    /// Something that is not needed any more, or that a person has to look at.
    Note(String),
}

/// A relay on its way into instances.tsv.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// What it might be called; made unique later.
    pub name: String,
    /// Its mark, where the source has one.
    pub mark: Option<Mark>,
    /// Where it listens.
    pub listen: std::net::SocketAddr,
    /// Where IPv4 clients go.
    pub target4: Option<std::net::SocketAddrV4>,
    /// Where IPv6 clients go.
    pub target6: Option<std::net::SocketAddrV6>,
    /// Its options.
    pub options: InstanceOptions,
    /// What the two files cannot say.
    pub notes: Vec<String>,
}

impl Hints {
    /// Adds those of another source.
    pub fn extend(&mut self, other: &Self) {
        self.marks.extend(&other.marks);
        self.tables.extend(&other.tables);
    }

    /// What a command such as `ip rule add … fwmark 123 lookup 100` uses.
    fn of_command(words: &[String]) -> Option<Self> {
        let is_ip = words
            .iter()
            .any(|word| word == "ip" || word.ends_with("/ip"));
        let is_routing = words.iter().any(|word| word == "rule" || word == "route");
        if !is_ip || !is_routing {
            return None;
        }
        let behind = |keys: &[&str]| {
            let at = words
                .iter()
                .position(|word| keys.contains(&word.as_str()))?;
            let number = words.get(at + 1)?.split('/').next()?;
            match number.strip_prefix("0x") {
                Some(hex) => u32::from_str_radix(hex, 16).ok(),
                None => number.parse().ok(),
            }
        };
        Some(Self {
            marks: behind(&["fwmark"]).into_iter().collect(),
            tables: behind(&["table", "lookup"]).into_iter().collect(),
        })
    }
}

/// A command line of one of the old programs: `go-mmproxy -l …`, whatever stands before the program's name.
///
/// None where no old program is called.
pub fn command_line(
    words: &[String],
    name: Option<&str>,
    directory: Option<&Path>,
) -> Option<Result<(Meaning, Found), String>> {
    let at = words
        .iter()
        .position(|word| OldName::of(word.as_ref()).is_some())?;
    let called = OldName::of(words[at].as_ref())?;
    // what follows in a shell's line is another command
    let end = words[at..]
        .iter()
        .position(|word| matches!(word.as_str(), "&&" | "||" | ";" | "|" | "&"))
        .map_or(words.len(), |length| at + length);
    Some(match compat::parse(called, &words[at + 1..end]) {
        Err(error) => Err(error.to_string()),
        Ok(Invocation::Help | Invocation::Version) => Err("this only prints something".to_owned()),
        Ok(Invocation::Json(file)) => {
            let file = directory.map_or(file.clone(), |directory| directory.join(&file));
            let note = format!("its routes are in {}", file.display());
            let found = Found {
                json_files: vec![file],
                ..Found::default()
            };
            Ok((Meaning::Note(note), found))
        }
        Ok(Invocation::Relay(relay)) => drafts(&relay, name, directory)
            .map(|drafts| (Meaning::Relays(drafts), Found::default())),
    })
}

/// One draft for each address that the old program listened on.
fn drafts(
    relay: &compat::Relay,
    name: Option<&str>,
    directory: Option<&Path>,
) -> Result<Vec<Draft>, String> {
    let mut notes = relay.notes.clone();
    let listen = match &relay.listen {
        Place::Addr(addr) => *addr,
        Place::Name { .. } => return Err(format!("{}: write the address instead", relay.listen)),
    };
    let target4 = target(&relay.target4, "127.0.0.1")?;
    let target6 = target(&relay.target6, "[::1]")?;
    let mut options = InstanceOptions::defaults(relay.protocol);
    options.port = relay.port;
    if relay.protocol == Protocol::Udp {
        options.idle_timeout = Some(relay.close_after);
    }
    if relay.listeners.get() > 1 {
        options.listeners = Some(relay.listeners);
    }
    match &relay.allow {
        Some(file) => {
            options.allow = Some(directory.map_or(file.clone(), |directory| directory.join(file)));
        }
        None => notes.push(
            "everyone was believed: without an allow list nothing starts any more, so write allow.txt".to_owned(),
        ),
    }
    if relay.destination == Destination::Header {
        notes.push(
            "-dynamic-destination is target=header with - in columns 4 to 6, and needs destinations=, the \
             networks that may be connected to: until then the two targets stand here"
                .to_owned(),
        );
    }
    if relay.listening == Listening::Transparent {
        options.listen = ListenMode::Transparent;
        notes.push(
            "listen=transparent as before, with the TPROXY rules that are there: 'pathway add' makes them where \
             the listen address names what is routed here, such as 203.0.113.0/24:443"
                .to_owned(),
        );
    }
    if relay.port == PortPolicy::Any {
        notes.push(
            "port=any as before: the service sees the client's address and another port".to_owned(),
        );
    }
    if relay.verbosity > 0 {
        let flag = if relay.verbosity > 1 { "-vv" } else { "-v" };
        notes.push(format!(
            "as much in the log as before: mmproxyctl {flag} run"
        ));
    }
    let listens = match relay.ancestor {
        Ancestor::Go => compat::places(listen, true),
        Ancestor::Rust | Ancestor::Cloudflare => vec![listen],
    };
    let default = format!("{}-{}", relay.protocol, listen.port());
    let draft = |listen: std::net::SocketAddr| Draft {
        name: name.unwrap_or(&default).to_owned(),
        mark: relay.mark,
        listen,
        target4: match target4 {
            std::net::SocketAddr::V4(addr) => Some(addr),
            std::net::SocketAddr::V6(_) => None,
        },
        target6: match target6 {
            std::net::SocketAddr::V6(addr) => Some(addr),
            std::net::SocketAddr::V4(_) => None,
        },
        options: options.clone(),
        notes: notes.clone(),
    };
    Ok(listens.into_iter().map(draft).collect())
}

/// A target's address; the name that every host has for itself is known.
fn target(place: &Place, loopback: &str) -> Result<std::net::SocketAddr, String> {
    match place {
        Place::Addr(addr) => Ok(*addr),
        Place::Name { host, port } if host == "localhost" => format!("{loopback}:{port}")
            .parse()
            .map_err(|_| format!("{place} is no address")),
        Place::Name { .. } => Err(format!("{place}: write the address instead")),
    }
}

/// The routes of a JSON file.
pub fn json(path: &Path, text: &str, form: &JsonForm) -> Found {
    // the JSON form has addresses only
    let listens = form
        .instances
        .iter()
        .zip(&form.lines)
        .filter_map(|(instance, line)| Some((instance, line, instance.listen.ports()?.first())));
    let entries = listens
        .map(|(instance, line, listen)| Entry {
            source: path.display().to_string(),
            line: Some(*line),
            text: text.lines().nth(line - 1).unwrap_or("").trim().to_owned(),
            meaning: Meaning::Relays(vec![Draft {
                name: instance.name.to_string(),
                mark: instance.mark,
                listen,
                target4: instance.target4,
                target6: instance.target6,
                options: InstanceOptions {
                    listeners: instance.options.listeners.filter(|count| count.get() > 1),
                    ..instance.options.clone()
                },
                notes: vec![
                    "everyone was believed: without an allow list nothing starts any more, so write allow.txt"
                        .to_owned(),
                ],
            }]),
        })
        .collect();
    Found {
        entries,
        ..Found::default()
    }
}
