//! What `nft -j list ruleset` writes.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde_json::Value;

use super::{Action, At, Base, FilterRule, Matches, Named, Prefix};

/// A chain's key: family, table, name.
type Chain = (String, String, String);

#[derive(Default)]
struct Chains {
    hooks: BTreeMap<Chain, String>,
    jumps: BTreeMap<Chain, BTreeSet<Chain>>,
}

/// Reads the whole of it. Tables in `known` (family, name) are left out: iptables has shown them.
pub fn parse(json: &str, known: &BTreeSet<(String, String)>) -> Vec<FilterRule> {
    let Ok(listing) = serde_json::from_str::<Value>(json) else {
        return Vec::new();
    };
    let mut chains = Chains::default();
    let mut rules = Vec::new();
    for object in listing["nftables"].as_array().into_iter().flatten() {
        if let Some(chain) = object.get("chain") {
            let key = key(chain, "name");
            if known.contains(&(key.0.clone(), key.1.clone())) {
                continue;
            }
            if let Some(hook) = chain["hook"].as_str() {
                chains.hooks.insert(key.clone(), hook.to_owned());
            }
            if chain["policy"] == "drop" {
                rules.push((key, "policy drop".to_owned(), Read::dropping()));
            }
        } else if let Some(rule) = object.get("rule") {
            let key = key(rule, "chain");
            if known.contains(&(key.0.clone(), key.1.clone())) {
                continue;
            }
            let read = read(rule);
            if let Some(target) = &read.target {
                let to = (key.0.clone(), key.1.clone(), target.clone());
                chains.jumps.entry(to).or_default().insert(key.clone());
            }
            rules.push((key, words(rule), read));
        }
    }
    rules
        .into_iter()
        .map(|(key, text, read)| FilterRule {
            ours: text.contains("mmproxyctl") || key.1 == "mmproxy",
            at: At {
                program: "nft".to_owned(),
                bases: chains.bases(&key),
                family: key.0,
                table: key.1,
                chain: key.2,
            },
            text,
            matches: read.matches,
            action: read.action,
            packets: read.packets.map(|count| (count, count)),
        })
        .collect()
}

fn key(object: &Value, name: &str) -> Chain {
    let text = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
    (text("family"), text("table"), text(name))
}

impl Chains {
    fn bases(&self, chain: &Chain) -> Vec<Base> {
        let mut seen = BTreeSet::from([chain.clone()]);
        let mut open = vec![chain.clone()];
        while let Some(chain) = open.pop() {
            for from in self.jumps.get(&chain).into_iter().flatten() {
                if seen.insert(from.clone()) {
                    open.push(from.clone());
                }
            }
        }
        seen.into_iter()
            .filter_map(|chain| {
                Some(Base {
                    hook: self.hooks.get(&chain)?.clone(),
                    chain: chain.2,
                })
            })
            .collect()
    }
}

struct Read {
    matches: Matches,
    action: Action,
    packets: Option<u64>,
    target: Option<String>,
}

impl Read {
    fn dropping() -> Self {
        Self {
            matches: Matches::default(),
            action: Action::Drop,
            packets: None,
            target: None,
        }
    }
}

fn read(rule: &Value) -> Read {
    let mut read = Read {
        action: Action::Other,
        ..Read::dropping()
    };
    for statement in rule["expr"].as_array().into_iter().flatten() {
        let Some((name, value)) = statement.as_object().and_then(|one| one.iter().next()) else {
            continue;
        };
        match name.as_str() {
            "match" => matched(&mut read.matches, value),
            "counter" => read.packets = value["packets"].as_u64(),
            "drop" | "reject" => read.action = Action::Drop,
            "accept" | "return" => read.action = Action::Accept,
            "notrack" => read.action = Action::NoTrack,
            "mangle" if value["key"]["meta"]["key"] == "mark" => {
                if let Some((mark, mask)) = set_mark(&value["value"]) {
                    read.action = Action::SetMark(mark, mask);
                }
            }
            "jump" | "goto" => read.target = value["target"].as_str().map(str::to_owned),
            "limit" => read.matches.beyond = true,
            _ => {}
        }
    }
    read
}

/// `5`, or `mark & 0xffff00ff | 0x100`: the value, and the bits that change.
fn set_mark(value: &Value) -> Option<(u32, u32)> {
    if let Some(mark) = number(value) {
        return Some((mark, u32::MAX));
    }
    let operands = value.get("|")?.as_array()?;
    let set = number(operands.get(1)?)?;
    let first = operands.first()?;
    let kept = match first.get("&") {
        Some(and) => number(and.get(1)?)?,
        None => u32::MAX,
    };
    Some((set, !kept | set))
}

fn number(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|value| u32::try_from(value).ok())
}

fn matched(matches: &mut Matches, value: &Value) {
    let inverted = value["op"] == "!=";
    let plain = matches!(value["op"].as_str(), Some("==" | "!="));
    let (left, right) = (&value["left"], &value["right"]);
    let understood = plain
        && if let Some(meta) = left["meta"]["key"].as_str() {
            of_packet(matches, meta, right, inverted)
        } else if let Some(payload) = left.get("payload") {
            of_header(matches, payload, right, inverted)
        } else if let (Some(and), Some(mark)) = (left["&"].as_array(), number(right)) {
            let is_mark = and.first().is_some_and(|one| one["meta"]["key"] == "mark");
            let mask = and.get(1).and_then(number).filter(|_| is_mark);
            matches.mark = mask.map(|mask| (mark, mask, inverted)).or(matches.mark);
            mask.is_some()
        } else {
            false
        };
    matches.beyond |= !understood;
}

fn of_packet(matches: &mut Matches, key: &str, right: &Value, inverted: bool) -> bool {
    let named = right.as_str().map(|name| Named {
        name: name.to_owned(),
        inverted,
    });
    match key {
        "iifname" | "iif" => matches.iif = named.clone(),
        "oifname" | "oif" => matches.oif = named.clone(),
        "l4proto" if !inverted => {
            matches.protocol = right.as_str().map(str::to_owned);
            return matches.protocol.is_some();
        }
        "mark" => {
            matches.mark = number(right).map(|mark| (mark, u32::MAX, inverted));
            return matches.mark.is_some();
        }
        _ => return false,
    }
    named.is_some()
}

fn of_header(matches: &mut Matches, payload: &Value, right: &Value, inverted: bool) -> bool {
    let protocol = payload["protocol"].as_str().unwrap_or_default();
    let field = payload["field"].as_str().unwrap_or_default();
    match (protocol, field) {
        ("ip" | "ip6", "saddr" | "daddr") => {
            let prefix = prefix(right).map(|net| Prefix { net, inverted });
            if field == "saddr" {
                matches.source = prefix;
            } else {
                matches.destination = prefix;
            }
            prefix.is_some()
        }
        ("tcp" | "udp", "sport" | "dport") if !inverted => {
            matches.protocol = Some(protocol.to_owned());
            let range = ports(right);
            if field == "sport" {
                matches.sport = range;
            } else {
                matches.dport = range;
            }
            range.is_some()
        }
        _ => false,
    }
}

fn prefix(value: &Value) -> Option<IpNet> {
    if let Some(address) = value.as_str() {
        return crate::model::parse_prefix(address).ok();
    }
    let prefix = value.get("prefix")?;
    let length = u8::try_from(prefix["len"].as_u64()?).ok()?;
    IpNet::new(prefix["addr"].as_str()?.parse().ok()?, length).ok()
}

fn ports(value: &Value) -> Option<(u16, u16)> {
    let port = |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok());
    if let Some(one) = port(value) {
        return Some((one, one));
    }
    let range = value["range"].as_array()?;
    Some((port(range.first()?)?, port(range.get(1)?)?))
}

/// A rule in about the words of `nft list`; what is not understood is shown as JSON.
fn words(rule: &Value) -> String {
    let mut words: Vec<String> = Vec::new();
    for statement in rule["expr"].as_array().into_iter().flatten() {
        let Some((name, value)) = statement.as_object().and_then(|one| one.iter().next()) else {
            continue;
        };
        words.push(match name.as_str() {
            "match" => {
                let op = match value["op"].as_str() {
                    Some("!=") => "!= ",
                    _ => "",
                };
                format!("{} {op}{}", term(&value["left"]), term(&value["right"]))
            }
            "counter" => "counter".to_owned(),
            "jump" | "goto" => format!("{name} {}", term(&value["target"])),
            "mangle" => format!("{} set {}", term(&value["key"]), term(&value["value"])),
            name => name.to_owned(),
        });
    }
    if let Some(comment) = rule["comment"].as_str() {
        words.push(format!("comment \"{comment}\""));
    }
    words.join(" ")
}

fn term(value: &Value) -> String {
    if let Some(text) = value.as_str() {
        return text.to_owned();
    }
    if let Some(key) = value["meta"]["key"].as_str() {
        return match key {
            "mark" => "meta mark".to_owned(),
            key => key.to_owned(),
        };
    }
    if let Some(payload) = value.get("payload") {
        return format!("{} {}", term(&payload["protocol"]), term(&payload["field"]));
    }
    if let Some(prefix) = value.get("prefix") {
        return format!("{}/{}", term(&prefix["addr"]), prefix["len"]);
    }
    if let Some(ct) = value["ct"]["key"].as_str() {
        return format!("ct {ct}");
    }
    for sign in ["&", "|"] {
        if let Some([left, right]) = value[sign].as_array().map(Vec::as_slice) {
            return format!("{} {sign} {}", term(left), term(right));
        }
    }
    match value.as_u64() {
        Some(number) => format!("{number:#x}"),
        None => value.to_string(),
    }
}
