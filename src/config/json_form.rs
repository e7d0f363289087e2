//! The JSON file of the go-mmproxy fork that serves several routes: `router[{from, to, to6}]`, `p`, `mark`,
//! `v`, `listeners`.
//!
//! Owns: the text, with comments and commas behind the last entry as that program's README has them, and
//! what its values mean. Must not know: where the file is named.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::num::NonZeroU32;
use std::ops::Range;
use std::path::Path;

use jsonc_parser::ast::{Object, ObjectProp, Value};
use jsonc_parser::common::Ranged;
use jsonc_parser::{CollectOptions, ParseOptions, parse_to_ast};

use super::diagnostics::{Diagnostic, Diagnostics};
use super::source::{Position, Source};
use crate::compat::{Place, places, relay_name};
use crate::model::{
    Instance, InstanceOptions, ListenAddr, Mark, NamedTargets, Protocol, TargetPorts,
};

const KEYS: &str = "\"router\", \"p\", \"mark\", \"v\" and \"listeners\"";

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonForm {
    /// One relay for each route and family that it listens on.
    pub instances: Vec<Instance>,
    /// `v`: 0, 1 or 2.
    pub verbosity: u8,
    /// The line of each instance's route, 1-based.
    pub lines: Vec<usize>,
}

/// Reads the text; `None` where it has a mistake, which is then in `found`.
pub(super) fn parse(source: &Source, has_ipv6: bool, found: &mut Diagnostics) -> Option<JsonForm> {
    let before = found.errors();
    let options = ParseOptions {
        allow_missing_commas: false,
        allow_single_quoted_strings: false,
        ..ParseOptions::default()
    };
    let parsed = match parse_to_ast(source.text(), &CollectOptions::default(), &options) {
        Ok(parsed) => parsed,
        Err(error) => {
            let range = error.range();
            let place = position(source, range.start..range.end);
            found.push(Diagnostic::error(
                place,
                format!(
                    "this is no JSON: {}",
                    error.kind().to_string().to_lowercase()
                ),
                "JSON, in which comments and a comma behind the last entry are fine",
            ));
            return None;
        }
    };
    let Some(Value::Object(root)) = &parsed.value else {
        found.push(Diagnostic::error(
            source.path(),
            "this is no JSON object",
            format!("an object with {KEYS}"),
        ));
        return None;
    };
    let form = Reader { source, found }.form(root, has_ipv6);
    (found.errors() == before).then_some(form).flatten()
}

/// Where a range is; what spans lines is shown on its first.
fn position(source: &Source, range: Range<usize>) -> Position {
    let text = source.text();
    let start = text.floor_char_boundary(range.start.min(text.len()));
    let end = text.floor_char_boundary(range.end.clamp(start, text.len()));
    let first_line = text[start..end].split(['\n', '\r']).next().unwrap_or("");
    source.position(source.word(start..start + first_line.len()))
}

struct Reader<'s, 'f> {
    source: &'s Source,
    found: &'f mut Diagnostics,
}

/// The addresses of one route.
struct Route {
    from: SocketAddr,
    target4: Option<SocketAddrV4>,
    target6: Option<SocketAddrV6>,
    place: Position,
}

impl Reader<'_, '_> {
    fn form(&mut self, root: &Object<'_>, has_ipv6: bool) -> Option<JsonForm> {
        self.known(root, &["router", "p", "mark", "v", "listeners"], KEYS);
        let protocol = match self.text(root, "p") {
            None => Protocol::Tcp,
            Some((text, at)) => match text.as_str() {
                "tcp" | "" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                other => {
                    self.wrong(
                        at,
                        format!("'{other}' is no protocol"),
                        "\"tcp\" or \"udp\"",
                    );
                    return None;
                }
            },
        };
        let mark = self.number(root, "mark", 0, u32::MAX).unwrap_or(0);
        let listeners = self
            .number(root, "listeners", 1, 1024)
            .and_then(NonZeroU32::new);
        let verbosity = self.number(root, "v", 0, u32::MAX).unwrap_or(0).min(2);
        let mut options = InstanceOptions::defaults(protocol);
        options.listeners = listeners.or(NonZeroU32::new(1));
        let mut instances = Vec::new();
        let mut lines = Vec::new();
        let mut taken: Vec<(SocketAddr, Position)> = Vec::new();
        for route in self.routes(root) {
            for listen in places(route.from, has_ipv6) {
                if let Some((_, first)) = taken.iter().find(|(other, _)| *other == listen) {
                    self.found.push(
                        Diagnostic::error(
                            &route.place,
                            format!("two routes listen on {listen}"),
                            "an address or a port of its own",
                        )
                        .with(first, "the first one"),
                    );
                    continue;
                }
                taken.push((listen, route.place.clone()));
                lines.push(route.place.line);
                instances.push(Instance {
                    name: relay_name(protocol, listen).ok()?,
                    mark: Mark::new(mark),
                    listen: ListenAddr::new(listen).into(),
                    target4: route.target4,
                    target6: route.target6,
                    target_ports: TargetPorts::One,
                    named: NamedTargets::default(),
                    options: options.clone(),
                });
            }
        }
        Some(JsonForm {
            instances,
            verbosity: u8::try_from(verbosity).unwrap_or(2),
            lines,
        })
    }

    fn routes(&mut self, root: &Object<'_>) -> Vec<Route> {
        const EXPECTED: &str =
            "\"router\": [{\"from\": \"0.0.0.0:1111\", \"to\": \"127.0.0.1:2222\"}]";
        let list = match property(root, "router").map(|property| &property.value) {
            Some(Value::Array(list)) if !list.elements.is_empty() => list,
            Some(other) => {
                self.wrong(range(other), "\"router\" has no route", EXPECTED);
                return Vec::new();
            }
            None => {
                self.wrong(range(root), "\"router\" is missing", EXPECTED);
                return Vec::new();
            }
        };
        let mut routes = Vec::new();
        for element in &list.elements {
            match element {
                Value::Object(route) => routes.extend(self.route(route)),
                other => self.wrong(range(other), "this is no route", EXPECTED),
            }
        }
        routes
    }

    fn route(&mut self, route: &Object<'_>) -> Option<Route> {
        self.known(
            route,
            &["from", "to", "to6"],
            "\"from\", \"to\" and \"to6\"",
        );
        let Some((from, at)) = self.text(route, "from") else {
            self.wrong(
                range(route),
                "\"from\" is missing",
                "\"from\": \"0.0.0.0:1111\"",
            );
            return None;
        };
        let place = position(self.source, at.clone());
        let from = self.addr(&from, at, "an address to listen on such as 0.0.0.0:1111");
        let to = self.target(
            route,
            "to",
            "an IPv4 address and a port such as 127.0.0.1:2222",
        );
        let to6 = self.target(
            route,
            "to6",
            "an IPv6 address and a port such as [::1]:2222",
        );
        let target4 = match to {
            // that program connects to loopback then, and so do we
            Some(SocketAddr::V4(to)) if to.ip().is_unspecified() => {
                Some(SocketAddrV4::new(Ipv4Addr::LOCALHOST, to.port()))
            }
            Some(SocketAddr::V4(to)) => Some(to),
            _ => None,
        };
        let target6 = match to6 {
            Some(SocketAddr::V6(to)) if to.ip().is_unspecified() => {
                Some(SocketAddrV6::new(Ipv6Addr::LOCALHOST, to.port(), 0, 0))
            }
            Some(SocketAddr::V6(to)) => Some(to),
            _ => None,
        };
        if target4.is_none() && target6.is_none() && self.found.errors() == 0 {
            self.wrong(
                range(route),
                "this route leads nowhere",
                "\"to\" or \"to6\"",
            );
        }
        Some(Route {
            from: from?,
            target4,
            target6,
            place,
        })
    }

    /// A target of the key's family; an empty text is none.
    fn target(&mut self, route: &Object<'_>, key: &str, expected: &str) -> Option<SocketAddr> {
        let (text, at) = self.text(route, key)?;
        if text.is_empty() {
            return None;
        }
        let addr = self.addr(&text, at.clone(), expected)?;
        if addr.is_ipv6() != (key == "to6") {
            self.wrong(at, format!("{addr} is of the other family"), expected);
            return None;
        }
        Some(addr)
    }

    fn addr(&mut self, text: &str, at: Range<usize>, expected: &str) -> Option<SocketAddr> {
        match Place::parse(text) {
            Ok(Place::Addr(addr)) if !addr.ip().is_multicast() => Some(addr),
            _ => {
                self.wrong(
                    at,
                    format!("'{text}' is not an address with a port"),
                    expected,
                );
                None
            }
        }
    }

    fn text(&mut self, object: &Object<'_>, key: &str) -> Option<(String, Range<usize>)> {
        let property = property(object, key)?;
        match &property.value {
            Value::StringLit(text) => Some((text.value.to_string(), range(text))),
            other => {
                self.wrong(
                    range(other),
                    format!("\"{key}\" is no text"),
                    "a text in double quotes",
                );
                None
            }
        }
    }

    fn number(&mut self, object: &Object<'_>, key: &str, least: u32, most: u32) -> Option<u32> {
        let value = &property(object, key)?.value;
        let number = match value {
            Value::NumberLit(number) => number.value.parse().ok(),
            _ => None,
        };
        let number = number.filter(|number| (least..=most).contains(number));
        if number.is_none() {
            let expected = format!("a number from {least} to {most}");
            self.wrong(
                range(value),
                format!("\"{key}\" is no such number"),
                &expected,
            );
        }
        number
    }

    /// Other keys were always passed over: they get a warning.
    fn known(&mut self, object: &Object<'_>, keys: &[&str], expected: &str) {
        for property in &object.properties {
            let name = property.name.as_str();
            if !keys.iter().any(|key| key.eq_ignore_ascii_case(name)) {
                let place = position(self.source, range(&property.name));
                self.found.push(Diagnostic::warning(
                    place,
                    format!("\"{name}\" means nothing here"),
                    expected,
                ));
            }
        }
    }

    fn wrong(&mut self, at: Range<usize>, problem: impl Into<String>, expected: &str) {
        let place = position(self.source, at);
        self.found.push(Diagnostic::error(place, problem, expected));
    }
}

/// Go's JSON finds keys whatever their case, and takes the last of several.
fn property<'o, 'a>(object: &'o Object<'a>, key: &str) -> Option<&'o ObjectProp<'a>> {
    object
        .properties
        .iter()
        .rev()
        .find(|property| property.name.as_str().eq_ignore_ascii_case(key))
}

fn range(node: &impl Ranged) -> Range<usize> {
    node.start()..node.end()
}

/// Reads a file of this form.
///
/// # Errors
/// Every mistake in it.
pub fn read(path: &Path, has_ipv6: bool) -> Result<(JsonForm, Diagnostics), Diagnostics> {
    let mut found = Diagnostics::default();
    let source = match Source::read(path.to_owned()) {
        Ok(source) => source,
        Err(error) => {
            found.push(super::unreadable(
                path,
                &error,
                "a JSON file with the routes",
            ));
            return Err(found);
        }
    };
    match parse(&source, has_ipv6, &mut found) {
        Some(form) => Ok((form, found.sorted())),
        None => Err(found.sorted()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<JsonForm, String> {
        let source = Source::new(Path::new("mmproxy.json"), text.as_bytes());
        let mut found = Diagnostics::default();
        parse(&source, true, &mut found).ok_or_else(|| found.draw(false))
    }

    fn routes(form: &JsonForm) -> Vec<String> {
        let target =
            |addr: Option<SocketAddr>| addr.map_or("-".to_owned(), |addr| addr.to_string());
        let one = |one: &Instance| {
            let (four, six) = (one.target4.map(Into::into), one.target6.map(Into::into));
            format!(
                "{} {} {} {}",
                one.name,
                one.listen,
                target(four),
                target(six)
            )
        };
        form.instances.iter().map(one).collect()
    }

    #[test]
    fn the_file_of_the_readme() {
        // with a comma behind the last entry, as printed there, and with comments
        let form = read(
            "{\n  // one service\n  \"router\": [\n    {\n      \"from\":\"0.0.0.0:1111\",\n      \"to\":\"127.0.0.1:2222\"\n    }\n  ],\n  \"p\":\"tcp\", /* or udp */\n  \"mark\":0,\n  \"v\":0,\n  \"listeners\":1,\n}\n",
        )
        .unwrap();
        assert_eq!(
            routes(&form),
            [
                "tcp-0.0.0.0-1111 0.0.0.0:1111 127.0.0.1:2222 -",
                "tcp-any6-1111 [::]:1111 127.0.0.1:2222 -"
            ]
        );
        assert_eq!(form.instances[0].mark, None);
        assert_eq!(form.lines, [5, 5]);
    }

    #[test]
    fn several_routes_and_wildcard_targets() {
        let form = read(
            r#"{"Router": [{"from": "10.0.0.1:1", "to": "0.0.0.0:22"}, {"from": "10.0.0.1:2", "to": "", "to6": "[::]:22"}],
                "p": "udp", "mark": 123, "v": 9, "listeners": 4}"#,
        )
        .unwrap();
        assert_eq!(
            routes(&form),
            [
                "udp-10.0.0.1-1 10.0.0.1:1 127.0.0.1:22 -",
                "udp-10.0.0.1-2 10.0.0.1:2 - [::1]:22"
            ]
        );
        let options = &form.instances[0].options;
        assert_eq!(options.protocol, Protocol::Udp);
        assert_eq!(options.listeners, NonZeroU32::new(4));
        assert_eq!(form.instances[0].mark, Mark::new(123));
        assert_eq!(form.verbosity, 2);
    }

    #[test]
    fn mistakes_are_shown_where_they_are() {
        for (text, said) in [
            ("", "no JSON object"),
            ("[]", "no JSON object"),
            ("{", "no JSON"),
            ("{\"router\": [}", "no JSON"),
            ("{}", "\"router\" is missing"),
            ("{\"router\": []}", "\"router\" has no route"),
            ("{\"router\": [1]}", "no route"),
            (
                "{\"router\": [{\"to\": \"127.0.0.1:1\"}]}",
                "\"from\" is missing",
            ),
            ("{\"router\": [{\"from\": \"1.2.3.4:1\"}]}", "leads nowhere"),
            (
                "{\"router\": [{\"from\": \"1111\", \"to\": \"127.0.0.1:1\"}]}",
                "'1111' is not an address",
            ),
            (
                "{\"router\": [{\"from\": \"1.2.3.4:1\", \"to\": \"[::1]:1\"}]}",
                "the other family",
            ),
            (
                "{\"router\": [{\"from\": \"1.2.3.4:1\", \"to\": 5}]}",
                "\"to\" is no text",
            ),
            (
                "{\"router\": [{\"from\": \":1\", \"to\": \"127.0.0.1:1\"}, {\"from\": \"0.0.0.0:1\", \"to\": \"127.0.0.1:2\"}]}",
                "two routes listen on 0.0.0.0:1",
            ),
            (
                "{\"router\": [{\"from\": \":1\", \"to\": \"127.0.0.1:1\"}], \"p\": \"sctp\"}",
                "'sctp' is no protocol",
            ),
            (
                "{\"router\": [{\"from\": \":1\", \"to\": \"127.0.0.1:1\"}], \"mark\": -1}",
                "\"mark\" is no such number",
            ),
            (
                "{\"router\": [{\"from\": \":1\", \"to\": \"127.0.0.1:1\"}], \"listeners\": 0}",
                "\"listeners\" is no such number",
            ),
        ] {
            let shown = read(text).expect_err(text);
            assert!(shown.contains(said), "{text}:\n{shown}");
            assert!(shown.contains("mmproxy.json"), "{text}:\n{shown}");
        }
    }
}
