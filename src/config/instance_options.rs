//! The options column of instances.tsv.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::destinations;
use super::diagnostics::{Diagnostic, Diagnostics};
use super::options::Options;
use super::source::{Source, Word};
use crate::model::{
    InstanceOptions, Listen, ListenMode, PortPolicy, Protocol, UdpHeader, ValueError,
    parse_duration,
};

/// Every option there is, by its key.
pub const OPTIONS: [&str; 17] = [
    "protocol",
    "udp-header",
    "idle-timeout",
    "header-timeout",
    "connect-timeout",
    "allow",
    "listeners",
    "listen",
    "port",
    "max-connections",
    "max-flows",
    "max-flows-per-proxy",
    "socket-mode",
    "socket-owner",
    "resolve",
    "target",
    "destinations",
];

/// The most listeners an instance may have: beyond one a core they only cost.
const MAX_LISTENERS: u32 = 1024;

/// What is less loses clients behind one lost SYN or segment (proxy-protocol.txt, section 2).
const RECOMMENDED_HEADER_TIMEOUT: Duration = Duration::from_secs(3);

/// Reads the column, where there is one: the options, and the file of `allow=` with its place.
pub(super) fn parse<'s>(
    source: &'s Source,
    cell: Option<Word<'s>>,
    found: &mut Diagnostics,
) -> (InstanceOptions, Option<(PathBuf, Word<'s>)>) {
    let words = cell.into_iter().flat_map(|cell| {
        cell.split(|c| c == ',')
            .map(move |word| (word.trimmed(), cell))
    });
    let given = Options::new(source, words, &OPTIONS, found);
    let options = read(source, &given, found);
    let allow = options.allow.clone().zip(given.word("allow"));
    (options, allow)
}

/// Options that come as keys with values rather than as a column, from a command line.
///
/// # Errors
/// Every mistake in them, shown as the column that they would be.
pub fn from_words(words: &[(&str, &str)]) -> Result<(InstanceOptions, Diagnostics), Diagnostics> {
    let mut found = Diagnostics::default();
    let joined: Vec<String> = words
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let source = Source::new(Path::new("command line"), joined.join(",").as_bytes());
    let cell = source.word(0..source.text().len());
    // a comma or a line's end in a value is no separator here
    if let Some((key, value)) = words.iter().find(|(_, value)| {
        value.contains(|c: char| c == ',' || c.is_whitespace() || c.is_control())
    }) {
        found.push(Diagnostic::error(
            source.path(),
            format!("--{key} '{}' is no value", value.escape_debug()),
            "a single word",
        ));
        return Err(found);
    }
    let cell = (!cell.text.is_empty()).then_some(cell);
    let (options, _) = parse(&source, cell, &mut found);
    match found.errors() {
        0 => Ok((options, found)),
        _ => Err(found.sorted()),
    }
}

/// A listen address from a command line as `--listen-transparent` means it.
///
/// # Errors
/// Where the two do not go together.
pub fn listen_as_told(listen: &Listen, mode: ListenMode) -> Result<Listen, Diagnostics> {
    let mut found = Diagnostics::default();
    let source = Source::new(Path::new("command line"), listen.to_string().as_bytes());
    let place = source.word(0..source.text().len());
    listen_as(&source, (listen, place), None, mode, &mut found).ok_or(found)
}

fn read(source: &Source, given: &Options<'_>, found: &mut Diagnostics) -> InstanceOptions {
    let protocol = given.value("protocol", str::parse::<Protocol>, found);
    let default = InstanceOptions::defaults(protocol.unwrap_or_default());
    let udp_header = given.value("udp-header", str::parse::<UdpHeader>, found);
    let header_timeout = given.value("header-timeout", parse_duration, found);
    let options = InstanceOptions {
        protocol: default.protocol,
        udp_header: udp_header.unwrap_or(default.udp_header),
        idle_timeout: given
            .value("idle-timeout", parse_duration, found)
            .or(default.idle_timeout),
        header_timeout: header_timeout.unwrap_or(default.header_timeout),
        connect_timeout: given
            .value("connect-timeout", parse_duration, found)
            .unwrap_or(default.connect_timeout),
        allow: given.value("allow", parse_file, found),
        listeners: given.value("listeners", parse_listeners, found),
        listen: given
            .value("listen", str::parse::<ListenMode>, found)
            .unwrap_or_default(),
        port: given
            .value("port", str::parse::<PortPolicy>, found)
            .unwrap_or(default.port),
        max_connections: given.value("max-connections", parse_count, found),
        max_flows: given.value("max-flows", parse_count, found),
        max_flows_per_proxy: given.value("max-flows-per-proxy", parse_count, found),
        socket_mode: given.value("socket-mode", str::parse, found),
        socket_owner: given.value("socket-owner", str::parse, found),
        destinations: destinations::parse(source, given, found),
        resolve: given.value("resolve", parse_interval, found),
    };
    // with a protocol= that is itself a mistake, which options fit it is anyone's guess
    if protocol.is_some() || given.word("protocol").is_none() {
        check_protocol(source, given, options.protocol, found);
        if options.protocol == Protocol::Udp {
            check_flows(source, given, &options, found);
        }
    }
    if let Some(word) = given.word("header-timeout")
        && header_timeout.is_some_and(|timeout| timeout < RECOMMENDED_HEADER_TIMEOUT)
    {
        found.push(Diagnostic::warning(
            source.position(word),
            "one lost packet of the proxy takes longer than this header-timeout",
            "at least 3s, as the PROXY protocol recommends",
        ));
    }
    options
}

/// The listen address as `listen=` means it; `None` where the two do not go together.
pub(super) fn listen_as(
    source: &Source,
    (listen, place): (&Listen, Word<'_>),
    cell: Option<Word<'_>>,
    mode: ListenMode,
    found: &mut Diagnostics,
) -> Option<Listen> {
    let mistake = match mode {
        ListenMode::Own if matches!(listen, Listen::Network(_)) => Diagnostic::error(
            source.position(place),
            format!("{listen} is a network, of which no socket can have more than one address"),
            "listen=transparent (--listen-transparent), or an address and a port",
        ),
        ListenMode::Own => return Some(listen.clone()),
        ListenMode::Transparent => match listen.clone().transparent() {
            Ok(listen) => return Some(listen),
            Err(mistake) => {
                let complaint = Diagnostic::value(source.position(place), mistake);
                let words = cell.into_iter().flat_map(|cell| cell.split(|c| c == ','));
                let mut words = words.map(Word::trimmed);
                match words.find(|word| word.text.starts_with("listen=")) {
                    Some(word) => complaint.with(&source.position(word), "how it listens"),
                    None => complaint,
                }
            }
        },
    };
    found.push(mistake);
    None
}

/// What the listen address and the options must be for each other.
pub(super) fn check_listen(
    source: &Source,
    (listen, place): (&Listen, Word<'_>),
    cell: Option<Word<'_>>,
    options: &InstanceOptions,
    found: &mut Diagnostics,
) {
    let is_unix = matches!(listen, Listen::Unix(_));
    if is_unix && options.protocol == Protocol::Udp {
        found.push(Diagnostic::error(
            source.position(place),
            "a Unix socket carries connections, and this instance is protocol=udp",
            "an address and a port",
        ));
    }
    let strangers: &[&str] = if is_unix {
        // there is one socket per file, and its permissions say who is believed
        &["listeners", "allow"]
    } else {
        &["socket-mode", "socket-owner"]
    };
    let words = cell.into_iter().flat_map(|cell| cell.split(|c| c == ','));
    for word in words.map(Word::trimmed) {
        let key = word.text.split('=').next().unwrap_or_default();
        if !strangers.contains(&key) {
            continue;
        }
        let (what, needs) = if is_unix {
            ("a Unix socket", "an address and a port")
        } else {
            ("an address and a port", "a Unix socket, unix:/path,")
        };
        let complaint = Diagnostic::error(
            source.position(word),
            format!("{key}= means nothing for {what}"),
            format!("{key}= with {needs} only"),
        );
        found.push(complaint.with(&source.position(place), "the listen address"));
    }
}

fn check_protocol(
    source: &Source,
    given: &Options<'_>,
    protocol: Protocol,
    found: &mut Diagnostics,
) {
    let (strangers, needs): (&[&str], Protocol) = match protocol {
        Protocol::Tcp => (
            &["udp-header", "max-flows", "max-flows-per-proxy"],
            Protocol::Udp,
        ),
        Protocol::Udp => (
            &["header-timeout", "connect-timeout", "max-connections"],
            Protocol::Tcp,
        ),
    };
    for (key, word) in strangers
        .iter()
        .filter_map(|key| Some((key, given.word(key)?)))
    {
        let complaint = Diagnostic::error(
            source.position(word),
            format!("{key}= means nothing for protocol={protocol}"),
            format!("{key}= with protocol={needs} only"),
        );
        found.push(match given.word("protocol") {
            Some(word) => complaint.with(&source.position(word), "the protocol"),
            None => complaint,
        });
    }
}

/// One proxy cannot have more flows than there are: such a number restricts nothing.
fn check_flows(
    source: &Source,
    given: &Options<'_>,
    options: &InstanceOptions,
    found: &mut Diagnostics,
) {
    let (Some(of_one), Some(at)) = (
        options.max_flows_per_proxy,
        given.text("max-flows-per-proxy"),
    ) else {
        return;
    };
    let complaint = |most: NonZeroU32, which: &str, or: &str| {
        Diagnostic::error(
            source.position(at),
            format!("one proxy would have more flows than all together, {which}{most}"),
            format!("a number from 1 to {most}{or}"),
        )
    };
    match (options.max_flows, given.word("max-flows")) {
        (Some(all), Some(word)) if of_one > all => found
            .push(complaint(all, "max-flows=", "").with(&source.position(word), "all together")),
        (None, None) if of_one > InstanceOptions::DEFAULT_MAX_FLOWS => found.push(complaint(
            InstanceOptions::DEFAULT_MAX_FLOWS,
            "by default ",
            ", or max-flows= as well",
        )),
        // a max-flows= that is no number is a mistake of its own
        _ => {}
    }
}

fn parse_file(text: &str) -> Result<PathBuf, ValueError> {
    if text.is_empty() {
        return Err(ValueError::new(
            "allow= names no file",
            "a file, absolute or beside instances.tsv",
        ));
    }
    Ok(PathBuf::from(text))
}

/// Looking up more often than this only costs.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);

fn parse_interval(text: &str) -> Result<Duration, ValueError> {
    let interval = parse_duration(text)?;
    if interval < SHORTEST_INTERVAL {
        return Err(ValueError::new(
            format!("'{text}' is too short to look names up again"),
            "1s or more",
        ));
    }
    Ok(interval)
}

fn parse_listeners(text: &str) -> Result<NonZeroU32, ValueError> {
    parse_count(text)
        .ok()
        .filter(|count| count.get() <= MAX_LISTENERS)
        .ok_or_else(|| {
            ValueError::new(
                format!("'{text}' is not a number of listeners"),
                format!("a number from 1 to {MAX_LISTENERS}"),
            )
        })
}

fn parse_count(text: &str) -> Result<NonZeroU32, ValueError> {
    text.parse()
        .ok()
        .filter(|_| !text.starts_with('+'))
        .ok_or_else(|| {
            ValueError::new(
                format!("'{text}' is not a number of connections or flows"),
                format!("a number from 1 to {}", u32::MAX),
            )
        })
}
