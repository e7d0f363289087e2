//! `targets=` of pathways.conf: the prefixes that a pathway serves beside loopback.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};

use super::diagnostics::{Diagnostic, Diagnostics};
use super::options::Options;
use super::source::{Source, Word};
use crate::model::{ValueError, parse_prefix};

/// Reads the list behind `targets=`; loopback is left out, for every pathway serves it.
pub(super) fn parse(
    source: &Source,
    options: &Options<'_>,
    list: Word<'_>,
    found: &mut Diagnostics,
) -> BTreeSet<IpNet> {
    let mut targets = BTreeSet::new();
    for word in list.split(|c| c == ',') {
        // nothing between two commas has no characters to point at
        let at = match options.word("targets") {
            Some(whole) if word.text.is_empty() => whole,
            _ => word,
        };
        match parse_target(word.text) {
            Ok(Target::Network { given, network }) => {
                if given != network {
                    found.push(Diagnostic::warning(
                        source.position(at),
                        format!("{given} has bits set behind its length"),
                        network.to_string(),
                    ));
                }
                targets.insert(network);
            }
            Ok(Target::Loopback(network)) => found.push(Diagnostic::warning(
                source.position(at),
                format!("{network} is loopback, which every pathway serves anyway"),
                "addresses that are not loopback",
            )),
            Err(mistake) => found.push(Diagnostic::value(source.position(at), mistake)),
        }
    }
    targets
}

enum Target {
    Network { given: IpNet, network: IpNet },
    Loopback(IpNet),
}

/// A prefix in which services may be; loopback is one, host bits are cleared.
///
/// # Errors
/// When no service could be reached in it, or too much would be covered.
pub(super) fn parse_service(text: &str) -> Result<IpNet, ValueError> {
    Ok(match parse_target(text)? {
        Target::Network { network, .. } => network,
        Target::Loopback(given) => given.trunc(),
    })
}

fn parse_target(text: &str) -> Result<Target, ValueError> {
    const EXPECTED: &str =
        "the services' own addresses or networks such as 10.0.0.5 or fd00:1::/64";
    if text.is_empty() {
        return Err(ValueError::new("an entry of the list is empty", EXPECTED));
    }
    let given = parse_prefix(text).map_err(|mistake| ValueError::new(mistake.problem, EXPECTED))?;
    let network = given.trunc();
    let wrong = |problem: String| Err(ValueError::new(problem, EXPECTED));
    if network.prefix_len() == 0 {
        // without "from" narrowed down, the table captures the relay's own packets, whose source is the client
        return wrong(format!(
            "{text} as target would lead every packet with the mark back to this host"
        ));
    }
    let loopback = if network.addr().is_ipv4() {
        IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8))
    } else {
        IpNet::from(IpAddr::V6(Ipv6Addr::LOCALHOST))
    };
    if loopback.contains(&network) {
        return Ok(Target::Loopback(given));
    }
    if network.contains(&loopback) {
        return wrong(format!("{text} covers loopback"));
    }
    match network.addr() {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            wrong(format!("{text} is IPv4 in IPv6 form"))
        }
        addr if addr.is_multicast() => wrong(format!("{text} is multicast")),
        addr if addr.is_unspecified() => wrong(format!("{text} is no address of a service")),
        _ => Ok(Target::Network { given, network }),
    }
}
