//! From words to flags with their values. Knows every spelling, and no meaning.

use super::FlagError;
use crate::compat::OldName;
use crate::compat::number;

/// A flag, whatever it was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flag {
    Listen,
    Target4,
    Target6,
    Protocol,
    Mark,
    Listeners,
    CloseAfter,
    Allow,
    Verbosity,
    Config,
    DynamicDestination,
    ListenTransparent,
    Table,
    Quiet,
    NoSandbox,
    KeepPort,
    Help,
    Version,
}

/// What follows a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    /// A value.
    Value,
    /// Nothing, or a truth value behind `=`.
    Truth,
    /// A number, or nothing.
    MaybeNumber,
}

/// Who else but everyone spells it so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// More than one program, or go-mmproxy.
    Common,
    /// mmproxy-rs alone.
    Rust,
    /// cloudflare/mmproxy alone.
    Cloudflare,
    /// Both of these.
    RustAndCloudflare,
}

/// A flag as given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) flag: Flag,
    pub(super) whose: Whose,
    /// As it was spelled, with one dash.
    pub(super) spelled: String,
    /// The value; none for a flag that stands alone.
    pub(super) value: Option<String>,
}

const SPELLINGS: &[(&str, Flag, Takes, Whose)] = {
    use Flag::*;
    use Takes::*;
    use Whose::*;
    &[
        ("l", Listen, Value, Common),
        ("listen-addr", Listen, Value, Rust),
        ("listen", Listen, Value, Cloudflare),
        ("4", Target4, Value, Common),
        ("ipv4", Target4, Value, Rust),
        ("target-v4", Target4, Value, Cloudflare),
        ("6", Target6, Value, Common),
        ("ipv6", Target6, Value, Rust),
        ("target-v6", Target6, Value, Cloudflare),
        ("p", Protocol, Value, Common),
        ("protocol", Protocol, Value, Rust),
        ("mark", Mark, Value, Common),
        ("m", Mark, Value, RustAndCloudflare),
        ("listeners", Listeners, Value, Common),
        ("close-after", CloseAfter, Value, Common),
        ("allowed-subnets", Allow, Value, Common),
        ("a", Allow, Value, RustAndCloudflare),
        ("allowed-networks", Allow, Value, Cloudflare),
        ("v", Verbosity, MaybeNumber, Common),
        ("verbose", Verbosity, Truth, Cloudflare),
        ("c", Config, Value, Common),
        ("dynamic-destination", DynamicDestination, Truth, Common),
        ("listen-transparent", ListenTransparent, Truth, Common),
        ("table", Table, Value, Cloudflare),
        ("t", Table, Value, Cloudflare),
        ("quiet", Quiet, Truth, Cloudflare),
        ("q", Quiet, Truth, Cloudflare),
        ("do-not-sandbox", NoSandbox, Truth, Cloudflare),
        ("N", NoSandbox, Truth, Cloudflare),
        ("force-real-client-port", KeepPort, Truth, Cloudflare),
        ("P", KeepPort, Truth, Cloudflare),
        ("h", Help, Truth, Common),
        ("help", Help, Truth, Common),
        ("version", Version, Truth, Common),
    ]
};

/// Flags and what they do, for `-h`.
pub(super) const HELP: &[(&str, &str)] = &[
    (
        "-l, -listen-addr, -listen ADDR:PORT",
        "where the proxy connects to (default 0.0.0.0:8443)",
    ),
    (
        "-4, -ipv4, -target-v4 ADDR:PORT",
        "where IPv4 clients go (default 127.0.0.1:443)",
    ),
    (
        "-6, -ipv6, -target-v6 [ADDR]:PORT",
        "where IPv6 clients go (default [::1]:443)",
    ),
    ("-p, -protocol tcp|udp", "what is relayed (default tcp)"),
    (
        "-allowed-subnets, -allowed-networks, -a FILE",
        "the proxies that are believed; without it everyone is, which is said at every start",
    ),
    (
        "-mark, -m N",
        "the firewall mark of connections to the target (default none; 123 with cloudflare's flags)",
    ),
    (
        "-listeners N",
        "sockets that share the listen address (default 1)",
    ),
    (
        "-close-after N, -c N",
        "seconds after which a silent UDP flow ends (default 60)",
    ),
    (
        "-v 0|1|2",
        "log nothing, errors, or everything about single connections (default 0; alone it means 2)",
    ),
    (
        "-dynamic-destination",
        "connect to the destination in the PROXY header instead of -4 and -6",
    ),
    (
        "-listen-transparent",
        "accept connections that TPROXY brings here",
    ),
    ("-c FILE", "read everything from a JSON file"),
    (
        "-table N, -quiet, -verbose, -force-real-client-port, -do-not-sandbox",
        "as cloudflare/mmproxy has them",
    ),
];

/// Every flag of a command line, in its order.
pub(super) fn read(name: OldName, words: &[String]) -> Result<Vec<Given>, FlagError> {
    let mut all = Vec::new();
    let mut words = words.iter().map(String::as_str).peekable();
    while let Some(word) = words.next() {
        let body = word
            .strip_prefix("--")
            .or_else(|| word.strip_prefix('-'))
            .unwrap_or_default();
        if word == "--" {
            match words.next() {
                Some(stray) => return Err(unexpected(name, stray)),
                None => break,
            }
        }
        if !word.starts_with('-') || word == "-" {
            return Err(unexpected(name, word));
        }
        if body.starts_with(['-', '=']) {
            return Err(FlagError::new(
                format!("'{word}' is no flag"),
                "one or two dashes, a name, and perhaps = and a value",
            ));
        }
        let (spelled, attached) = match body.split_once('=') {
            Some((spelled, value)) => (spelled, Some(value)),
            None => (body, None),
        };
        let Some(&(_, flag, takes, whose)) = SPELLINGS.iter().find(|one| one.0 == spelled) else {
            match run_together(word) {
                Some(apart) => all.extend(apart),
                None => return Err(unknown(name, word)),
            }
            continue;
        };
        let mut given = Given {
            flag,
            whose,
            spelled: format!("-{spelled}"),
            value: attached.map(str::to_owned),
        };
        if attached.is_none() {
            given.value = match takes {
                Takes::Truth => None,
                Takes::Value => match words.next() {
                    Some(value) => Some(value.to_owned()),
                    None => {
                        return Err(FlagError::new(
                            format!("{word} has no value"),
                            format!("a value behind {word}"),
                        ));
                    }
                },
                // go-mmproxy's -v has a number, cloudflare's stands alone
                Takes::MaybeNumber => words
                    .next_if(|next| !next.starts_with('-') || number::integer(next).is_some())
                    .map(str::to_owned),
            };
        }
        if takes == Takes::MaybeNumber && given.value.is_none() {
            given.whose = Whose::Cloudflare;
        }
        all.push(given);
    }
    Ok(all)
}

/// getopt's forms: `-l0.0.0.0:2222` (a value, which never begins with a letter) and `-qv`.
fn run_together(word: &str) -> Option<Vec<Given>> {
    let body = word
        .strip_prefix('-')
        .filter(|body| !body.starts_with('-'))?;
    let one = |letter: char, value: Option<&str>| {
        let spelled = letter.to_string();
        let &(_, flag, takes, whose) = SPELLINGS.iter().find(|one| one.0 == spelled)?;
        let stands_alone = takes != Takes::Value;
        (stands_alone == value.is_none()).then(|| Given {
            flag,
            whose,
            spelled: format!("-{letter}"),
            value: value.map(str::to_owned),
        })
    };
    let mut letters = body.chars();
    let first = letters.next()?;
    let rest = letters.as_str();
    if rest.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '[' | ':' | '/' | '.')) {
        return Some(vec![one(first, Some(rest))?]);
    }
    body.chars().map(|letter| one(letter, None)).collect()
}

fn unexpected(name: OldName, word: &str) -> FlagError {
    FlagError::new(
        format!("unexpected word '{word}'"),
        format!(
            "flags only; {} ignored it and every flag behind it",
            OldName::name(name)
        ),
    )
}

fn unknown(name: OldName, word: &str) -> FlagError {
    FlagError::new(
        format!("unknown flag '{word}'"),
        format!("{} -h lists them", name.name()),
    )
}

/// The words again with the listen address first and the mark last; none where one of them is not there.
pub(super) fn in_order(all: &[Given]) -> Option<Vec<String>> {
    let last = |flag| all.iter().rposition(|given| given.flag == flag);
    let (listen, mark) = (last(Flag::Listen)?, last(Flag::Mark)?);
    // whoever writes -m or --listen is not looked for by a pattern of go-mmproxy's flags
    if [listen, mark]
        .iter()
        .any(|at| all[*at].whose != Whose::Common)
    {
        return None;
    }
    let plain = |at: usize, spelled: &str| all[at].spelled == spelled;
    if listen < mark && plain(listen, "-l") && plain(mark, "-mark") {
        return None;
    }
    let word = |spelled: &str, value: &Option<String>| {
        std::iter::once(spelled.to_owned()).chain(value.clone())
    };
    let mut words: Vec<String> = word("-l", &all[listen].value).collect();
    for given in all {
        match (given.flag, &given.value) {
            (Flag::Listen | Flag::Mark, _) => {}
            // a truth value has to stay behind its =
            (_, Some(value)) if is_truth(given) => words.push(format!("{}={value}", given.spelled)),
            (_, value) => words.extend(word(&given.spelled, value)),
        }
    }
    words.extend(word("-mark", &all[mark].value));
    Some(words)
}

fn is_truth(given: &Given) -> bool {
    SPELLINGS
        .iter()
        .any(|one| one.0 == &given.spelled[1..] && one.2 == Takes::Truth)
}
