//! From flags to a relay: values, defaults, and what the programs demanded.

use std::fmt::Display;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use super::spelling::{Flag, Given, Whose};
use super::{Ancestor, Destination, FlagError, Invocation, Listening, Relay};
use crate::compat::OldName;
use crate::compat::listen::Place;
use crate::compat::number;
use crate::model::{Family, Mark, PortPolicy, Protocol, TableId};

/// What cloudflare/mmproxy marks connections with unless told otherwise, and the table it suggests.
const CLOUDFLARE_MARK: u32 = 123;
const CLOUDFLARE_TABLE: u32 = 100;

/// What the flags mean together. The last of several of the same kind counts, as with Go and getopt.
pub(super) fn of(name: OldName, all: &[Given]) -> Result<Invocation, FlagError> {
    let given = All(all);
    if given.truth(Flag::Help)? {
        return Ok(Invocation::Help);
    }
    if given.truth(Flag::Version)? {
        return Ok(Invocation::Version);
    }
    if let Some(file) = given.json_file() {
        let other = all.iter().find(|given| given.flag != Flag::Config);
        return match other {
            None => Ok(Invocation::Json(file)),
            Some(other) => Err(FlagError::new(
                format!("{} beside -c {}", other.spelled, file.display()),
                "-c alone: the file says everything",
            )),
        };
    }
    let ancestor = given.ancestor();
    if ancestor == Ancestor::Cloudflare {
        given.demand()?;
    }
    let mut notes = Vec::new();
    let mark = given.mark(name, ancestor, &mut notes)?;
    Ok(Invocation::Relay(Box::new(Relay {
        ancestor,
        listen: given.place(Flag::Listen, "0.0.0.0:8443")?,
        target4: given.target(Flag::Target4, Family::V4, "127.0.0.1:443")?,
        target6: given.target(Flag::Target6, Family::V6, "[::1]:443")?,
        protocol: given.protocol()?,
        mark,
        listeners: given.listeners()?,
        close_after: given.close_after(&mut notes)?,
        allow: given.allow()?,
        verbosity: given.verbosity()?,
        port: match given.truth(Flag::KeepPort)? {
            // cloudflare/mmproxy leaves the port to the kernel unless told
            false if ancestor == Ancestor::Cloudflare => PortPolicy::Any,
            _ => PortPolicy::Keep,
        },
        destination: match given.truth(Flag::DynamicDestination)? {
            true => Destination::Header,
            false => Destination::Targets,
        },
        listening: match given.truth(Flag::ListenTransparent)? {
            true => Listening::Transparent,
            false => Listening::Plain,
        },
        suggest: given.suggest(ancestor)?,
        notes,
    })))
}

struct All<'g>(&'g [Given]);

impl All<'_> {
    fn last(&self, flag: Flag) -> Option<&Given> {
        self.0.iter().rev().find(|given| given.flag == flag)
    }

    /// The flag as it was spelled and its value.
    fn value(&self, flag: Flag) -> Option<(&str, &str)> {
        let given = self.last(flag)?;
        Some((&given.spelled, given.value.as_deref()?))
    }

    /// A flag that stands alone, or has a truth value behind `=`.
    fn truth(&self, flag: Flag) -> Result<bool, FlagError> {
        match self.last(flag) {
            None => Ok(false),
            Some(Given { value: None, .. }) => Ok(true),
            Some(Given {
                spelled,
                value: Some(value),
                ..
            }) => number::truth(value).ok_or_else(|| invalid(spelled, value, "true or false")),
        }
    }

    fn integer(&self, flag: Flag, at_least: i64) -> Result<Option<i64>, FlagError> {
        let Some((spelled, value)) = self.value(flag) else {
            return Ok(None);
        };
        // what begins with 0 is octal for Go alone
        let read = match self.ancestor() {
            Ancestor::Go => number::integer(value),
            Ancestor::Rust | Ancestor::Cloudflare => number::decimal(value),
        };
        match read.filter(|number| *number >= at_least) {
            Some(number) => Ok(Some(number)),
            None => Err(invalid(
                spelled,
                value,
                format_args!("a number, {at_least} or more"),
            )),
        }
    }

    /// The file of `-c FILE`; `-c 60` is mmproxy-rs's `--close-after 60`.
    fn json_file(&self) -> Option<PathBuf> {
        let (_, value) = self.value(Flag::Config)?;
        number::decimal(value).is_none().then(|| value.into())
    }

    fn ancestor(&self) -> Ancestor {
        let any = |whose| self.0.iter().any(|given| given.whose == whose);
        if any(Whose::Cloudflare) {
            Ancestor::Cloudflare
        } else if any(Whose::Rust)
            || any(Whose::RustAndCloudflare)
            || self.last(Flag::Config).is_some()
        {
            Ancestor::Rust
        } else {
            Ancestor::Go
        }
    }

    /// What cloudflare/mmproxy does not start without; rightly so.
    fn demand(&self) -> Result<(), FlagError> {
        for (flag, spelled, example) in [
            (Flag::Allow, "--allowed-networks", "proxies.txt"),
            (Flag::Listen, "-l", "0.0.0.0:2222"),
            (Flag::Target4, "-4", "127.0.0.1:22"),
            (Flag::Target6, "-6", "[::1]:22"),
        ] {
            if self.last(flag).is_none() {
                return Err(FlagError::new(
                    format!("{spelled} is missing"),
                    format!("{spelled} {example}, as cloudflare/mmproxy demands"),
                ));
            }
        }
        Ok(())
    }

    fn place(&self, flag: Flag, default: &str) -> Result<Place, FlagError> {
        let (spelled, value) = self.value(flag).unwrap_or(("", default));
        Place::parse(value).map_err(|mistake| {
            FlagError::new(format!("{spelled}: {}", mistake.problem), mistake.expected)
        })
    }

    fn target(&self, flag: Flag, family: Family, default: &str) -> Result<Place, FlagError> {
        let place = self.place(flag, default)?;
        if let Place::Addr(addr) = place {
            let spelled = self.value(flag).map_or("", |(spelled, _)| spelled);
            if Family::of(addr.ip()) != family || is_mapped(addr) {
                return Err(invalid(
                    spelled,
                    addr,
                    format_args!("an {family} address and a port such as {default}"),
                ));
            }
            if addr.ip().is_unspecified() {
                return Err(invalid(
                    spelled,
                    addr,
                    format_args!("the service's own address, such as {default}"),
                ));
            }
        }
        Ok(place)
    }

    fn protocol(&self) -> Result<Protocol, FlagError> {
        let Some((spelled, value)) = self.value(Flag::Protocol) else {
            return Ok(Protocol::Tcp);
        };
        match value.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Protocol::Tcp),
            "udp" => Ok(Protocol::Udp),
            _ => Err(invalid(spelled, value, "tcp or udp")),
        }
    }

    fn mark(
        &self,
        name: OldName,
        ancestor: Ancestor,
        notes: &mut Vec<String>,
    ) -> Result<Option<Mark>, FlagError> {
        if let Some(number) = self.integer(Flag::Mark, 0)? {
            let (spelled, value) = self.value(Flag::Mark).unwrap_or_default();
            let number = u32::try_from(number)
                .map_err(|_| invalid(spelled, value, "a mark up to 4294967295"))?;
            return Ok(Mark::new(number));
        }
        if ancestor == Ancestor::Cloudflare {
            return Ok(Mark::new(CLOUDFLARE_MARK));
        }
        if self.may_be_cloudflares(name) {
            notes.push(format!(
                "these flags are cloudflare/mmproxy's as well as mmproxy-rs's, and no mark is among them: \
                 mark {CLOUDFLARE_MARK} is set, which the former does and the latter's routing allows; --mark 0 \
                 for none"
            ));
            return Ok(Mark::new(CLOUDFLARE_MARK));
        }
        Ok(None)
    }

    /// `mmproxy -a F -l A -4 B -6 C`, the example in cloudflare's README, is a line of mmproxy-rs too.
    fn may_be_cloudflares(&self, name: OldName) -> bool {
        let all_four = [Flag::Allow, Flag::Listen, Flag::Target4, Flag::Target6]
            .into_iter()
            .all(|flag| self.last(flag).is_some());
        let four_only = self.0.len() == 4;
        let short = self
            .last(Flag::Allow)
            .is_some_and(|given| given.whose == Whose::RustAndCloudflare);
        name == OldName::Mmproxy
            && all_four
            && four_only
            && short
            && self.0.iter().all(|given| given.whose != Whose::Rust)
    }

    fn listeners(&self) -> Result<NonZeroU32, FlagError> {
        let number = self.integer(Flag::Listeners, 1)?.unwrap_or(1);
        u32::try_from(number)
            .ok()
            .filter(|number| *number <= MAX_LISTENERS)
            .and_then(NonZeroU32::new)
            .ok_or_else(|| {
                let (spelled, value) = self.value(Flag::Listeners).unwrap_or_default();
                invalid(
                    spelled,
                    value,
                    format_args!("a number from 1 to {MAX_LISTENERS}"),
                )
            })
    }

    fn close_after(&self, notes: &mut Vec<String>) -> Result<Duration, FlagError> {
        let flag = match self.last(Flag::CloseAfter) {
            Some(_) => Flag::CloseAfter,
            None => Flag::Config,
        };
        let seconds = match self.integer(flag, 0)? {
            None => 60,
            Some(0) => {
                notes.push("a flow that ends after 0 s never answers: 1 s is taken".to_owned());
                1
            }
            Some(seconds) => seconds.unsigned_abs(),
        };
        if seconds > MAX_CLOSE_AFTER {
            let (spelled, value) = self.value(flag).unwrap_or_default();
            return Err(invalid(
                spelled,
                value,
                format_args!("seconds, {MAX_CLOSE_AFTER} at most"),
            ));
        }
        Ok(Duration::from_secs(seconds))
    }

    fn allow(&self) -> Result<Option<PathBuf>, FlagError> {
        match self.value(Flag::Allow) {
            // Go's default: no file
            Some((spelled, "")) if self.ancestor() != Ancestor::Go => {
                Err(invalid(spelled, "", "a file"))
            }
            Some((_, "")) | None => Ok(None),
            Some((_, file)) => Ok(Some(file.into())),
        }
    }

    fn verbosity(&self) -> Result<u8, FlagError> {
        match self.last(Flag::Verbosity) {
            None => Ok(0),
            Some(Given { value: None, .. }) => Ok(2),
            Some(Given {
                value: Some(value), ..
            }) => match (number::integer(value), number::truth(value)) {
                (Some(number @ 0..), _) => Ok(u8::try_from(number.min(2)).unwrap_or(2)),
                (None, Some(verbose)) => Ok(if verbose { 2 } else { 0 }),
                _ => Err(invalid("-v", value, "0, 1 or 2")),
            },
        }
    }

    fn suggest(&self, ancestor: Ancestor) -> Result<Option<TableId>, FlagError> {
        if ancestor != Ancestor::Cloudflare {
            return Ok(None);
        }
        let number = self
            .integer(Flag::Table, 0)?
            .unwrap_or(i64::from(CLOUDFLARE_TABLE));
        let table = u32::try_from(number).ok().and_then(TableId::new);
        let Some(table) = table else {
            let (spelled, value) = self.value(Flag::Table).unwrap_or_default();
            return Err(invalid(
                spelled,
                value,
                "a table of the pathway's own, not 0 and not 253 to 255",
            ));
        };
        Ok((!self.truth(Flag::Quiet)?).then_some(table))
    }
}

/// Beyond one a core they only cost; the same limit as in instances.tsv.
const MAX_LISTENERS: u32 = 1024;

/// A year.
const MAX_CLOSE_AFTER: u64 = 31_536_000;

fn is_mapped(addr: SocketAddr) -> bool {
    addr.ip() != addr.ip().to_canonical()
}

fn invalid(spelled: &str, value: impl Display, expected: impl Display) -> FlagError {
    FlagError::new(
        format!("invalid value '{value}' for {spelled}"),
        format!("expected {expected}"),
    )
}
