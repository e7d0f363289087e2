//! What `nft -j list table` says, by meaning: nft rewrites masks (`& 0xffffff00 | 0x7b` comes back as
//! `& 0xffffff7b | 0x7b`), drops one that takes all bits, and names things differently by version.

use ipnet::IpNet;
use serde_json::Value;

use super::words::nft_family;
use super::{Does, Hook, Key, Layout, Marks, PRIORITY, Table, TableRule, Targets};
use crate::model::{Interception, ListenNetwork, PortRange, Protocol, TRANSPARENT_MARK};

impl Table {
    /// Reads the JSON text; `None` where it is not of nft's shape.
    pub(crate) fn parse(json: &str) -> Option<Self> {
        let layout = Layout::parse(&serde_json::from_str(json).ok()?)?;
        if !layout.is_ours() {
            return Some(Self::Foreign);
        }
        let entries = layout.entries();
        Some(Self::Ours {
            exact: layout == Layout::of(&entries),
            awake: !layout.flagged,
            stays: layout.can_stay().then_some(layout),
            entries,
        })
    }
}

impl Layout {
    fn parse(listed: &Value) -> Option<Self> {
        let mut layout = Self::default();
        for object in listed.get("nftables")?.as_array()? {
            let (kind, value) = object.as_object()?.iter().next()?;
            let text = |key: &str| value.get(key).and_then(Value::as_str);
            match kind.as_str() {
                "metainfo" => {}
                // `dormant` unhooks every chain; what nft 1.0 lists as its flags is not to be trusted
                "table" => layout.flagged |= value.get("flags").is_some(),
                "chain" => {
                    let hook = text("hook").map(|hook| Hook {
                        kind: text("type").unwrap_or_default().to_owned(),
                        hook: hook.to_owned(),
                        priority: priority(value.get("prio")),
                        policy: text("policy").unwrap_or_default().to_owned(),
                    });
                    let chain = layout.chains.entry(text("name")?.to_owned());
                    chain.or_default().hook = hook;
                }
                "rule" => {
                    let chain = layout.chains.entry(text("chain")?.to_owned());
                    chain.or_default().rules.push(TableRule {
                        comment: text("comment").map(str::to_owned),
                        does: does(value.get("expr")?).unwrap_or(Does::Other),
                    });
                }
                "map" => match map(value) {
                    Some(targets) => _ = layout.maps.insert(text("name")?.to_owned(), targets),
                    None => layout.strange = true,
                },
                _ => layout.strange = true,
            }
        }
        Some(layout)
    }
}

fn priority(value: Option<&Value>) -> i64 {
    match value {
        Some(Value::String(name)) if name == "mangle" => PRIORITY,
        Some(value) => value.as_i64().unwrap_or(i64::MAX),
        None => i64::MAX,
    }
}

/// A map of marks as ours are.
fn map(value: &Value) -> Option<Targets> {
    let ours = value.get("type")? == "mark" && value.get("map")? == "verdict";
    if !ours || value.get("flags").is_some() {
        return None;
    }
    // an empty one is listed without elements
    value.get("elem").map_or(Some(Targets::new()), targets)
}

fn targets(elements: &Value) -> Option<Targets> {
    let of = |element: &Value| {
        let [mark, verdict] = element.as_array()?.as_slice() else {
            return None;
        };
        let target = verdict.get("jump")?.get("target")?.as_str()?;
        Some((number(mark)?, target.to_owned()))
    };
    elements.as_array()?.iter().map(of).collect()
}

fn does(expressions: &Value) -> Option<Does> {
    let expression = match expressions.as_array()?.as_slice() {
        [expression] => expression,
        all => return interception(all),
    };
    if let Some(dispatch) = expression.get("vmap") {
        let (key, mask, 0) = computed(dispatch.get("key")?)? else {
            return None;
        };
        let data = dispatch.get("data")?;
        let to = match data.as_str() {
            Some(name) => Marks::Map(name.strip_prefix('@')?.to_owned()),
            None => Marks::Inline(targets(data.get("set")?)?),
        };
        let key = key?;
        return Some(Does::Dispatch { key, mask, to });
    }
    if let Some(jump) = expression.get("jump") {
        return Some(Does::Jump(jump.get("target")?.as_str()?.to_owned()));
    }
    let set = expression.get("mangle")?;
    let (Some(key), u32::MAX, 0) = computed(set.get("key")?)? else {
        return None;
    };
    let (from, mut keep, value) = computed(set.get("value")?)?;
    if from.is_some_and(|from| from != key) {
        return None;
    }
    // bits that are set anyway need not be kept: the canonical form keeps none of them
    keep &= !value;
    Some(Does::Set { key, keep, value })
}

/// What hands packets to a listener, or drops the same packets.
fn interception(expressions: &[Value]) -> Option<Does> {
    let [to, port, from, rest @ ..] = expressions else {
        return None;
    };
    let (family, field, to) = payload(to)?;
    let network: IpNet = match to.get("prefix") {
        Some(prefix) => {
            let length = prefix.get("len")?;
            format!("{}/{length}", prefix.get("addr")?.as_str()?)
                .parse()
                .ok()?
        }
        None => IpNet::from(to.as_str()?.parse::<std::net::IpAddr>().ok()?),
    };
    let (protocol, dport, port) = payload(port)?;
    let whole = |value: &Value| u16::try_from(value.as_u64()?).ok();
    let ports = match port.get("range") {
        Some(range) => PortRange::new(whole(range.get(0)?)?, whole(range.get(1)?)?)?,
        None => PortRange::new(whole(port)?, whole(port)?)?,
    };
    let from = from.get("match")?;
    let from_lo = from.get("left")?.get("meta")?.get("key")? == "iifname"
        && from.get("right")? == "lo"
        && from.get("op")? == "!=";
    if (field, dport, family) != ("daddr", "dport", nft_family(network)) || !from_lo {
        return None;
    }
    let what = Interception {
        protocol: protocol.parse::<Protocol>().ok()?,
        listen: ListenNetwork::new(network, ports),
    };
    match rest {
        [drop] if drop.get("drop").is_some() => Some(Does::Refuse(what)),
        [tproxy, mark, accept] if accept.get("accept").is_some() => {
            let (tproxy, socket) = (tproxy.get("tproxy")?, what.listen.socket());
            let there = tproxy.get("addr")?.as_str()?.parse() == Ok(socket.ip())
                && tproxy.get("port")?.as_u64()? == u64::from(socket.port());
            let set = mark.get("mangle")?;
            let (Some(Key::Packet), u32::MAX, 0) = computed(set.get("key")?)? else {
                return None;
            };
            let (_, keep, value) = computed(set.get("value")?)?;
            let mask = !(keep & !value);
            (there && value == TRANSPARENT_MARK).then_some(Does::Intercept { what, mask })
        }
        _ => None,
    }
}

/// `protocol field == value`
fn payload(expression: &Value) -> Option<(&str, &str, &Value)> {
    let compared = expression.get("match")?;
    let payload = compared.get("left")?.get("payload")?;
    let text = |key| payload.get(key).and_then(Value::as_str);
    let equal = compared.get("op")? == "==";
    let right = compared.get("right").filter(|_| equal)?;
    Some((text("protocol")?, text("field")?, right))
}

fn number(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

/// An expression of one mark and constants as `(mark & keep) ^ flip`; a constant keeps nothing.
fn computed(expression: &Value) -> Option<(Option<Key>, u32, u32)> {
    if let Some(value) = number(expression) {
        return Some((None, 0, value));
    }
    let (operator, operands) = expression.as_object()?.iter().next()?;
    let is_mark = || operands.get("key").and_then(Value::as_str) == Some("mark");
    match operator.as_str() {
        "meta" if is_mark() => return Some((Some(Key::Packet), u32::MAX, 0)),
        "ct" if is_mark() && operands.get("dir").is_none() => {
            return Some((Some(Key::Connection), u32::MAX, 0));
        }
        _ => {}
    }
    let [left, right @ ..] = operands.as_array()?.as_slice() else {
        return None;
    };
    let (key, mut keep, mut flip) = computed(left)?;
    // some versions list `a & b | c` as one operation with three operands
    for right in right {
        let constant = number(right)?;
        match operator.as_str() {
            "&" => (keep, flip) = (keep & constant, flip & constant),
            "|" => (keep, flip) = (keep & !constant, flip & !constant | constant),
            "^" => flip ^= constant,
            _ => return None,
        }
    }
    Some((key, keep, flip))
}
