//! The allow list: which proxies are believed.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::ValueError;

/// The trusted proxies, as sorted disjoint ranges: a look-up is one binary search.
///
/// Cannot be empty, so that "no list" can never come to mean "everyone"; everyone is
/// `0.0.0.0/0` and `::/0`, written out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowList {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
    prefixes: Vec<IpNet>,
}

impl AllowList {
    /// The list of these prefixes, or `None` when there are none. Host bits are ignored.
    ///
    /// A prefix inside `::ffff:0:0/96` covers the IPv4 addresses it maps.
    pub fn new(prefixes: impl IntoIterator<Item = IpNet>) -> Option<Self> {
        let prefixes: Vec<IpNet> = prefixes
            .into_iter()
            .map(|net| unmapped(net.trunc()))
            .collect();
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for net in &prefixes {
            match net {
                IpNet::V4(net) => v4.push((net.network().to_bits(), net.broadcast().to_bits())),
                IpNet::V6(net) => v6.push((net.network().to_bits(), net.broadcast().to_bits())),
            }
        }
        (!prefixes.is_empty()).then(|| Self {
            v4: disjoint(v4),
            v6: disjoint(v6),
            prefixes,
        })
    }

    /// Whether this peer is trusted; an IPv4-mapped address is looked up as IPv4.
    pub fn allows(&self, proxy: IpAddr) -> bool {
        match proxy.to_canonical() {
            IpAddr::V4(addr) => covered(&self.v4, addr.to_bits()),
            IpAddr::V6(addr) => covered(&self.v6, addr.to_bits()),
        }
    }

    /// The prefixes as they were given, host bits cleared.
    pub fn prefixes(&self) -> &[IpNet] {
        &self.prefixes
    }
}

fn unmapped(net: IpNet) -> IpNet {
    match net {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => match v6.network().to_ipv4_mapped() {
            Some(v4) => Ipv4Net::new(v4, v6.prefix_len() - 96).map_or(net, IpNet::V4),
            None => net,
        },
        other => other,
    }
}

fn disjoint<T: Ord + Copy>(mut ranges: Vec<(T, T)>) -> Vec<(T, T)> {
    ranges.sort_unstable();
    let mut merged: Vec<(T, T)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(previous) if first <= previous.1 => previous.1 = previous.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn covered<T: Ord + Copy>(ranges: &[(T, T)], addr: T) -> bool {
    let after = ranges.partition_point(|&(first, _)| first <= addr);
    after.checked_sub(1).is_some_and(|at| addr <= ranges[at].1)
}

/// `a.b.c.d`, `a.b.c.d/n`, `v6` or `v6/n` as a prefix (ipnet itself rejects bare addresses).
///
/// # Errors
/// When the text is neither.
pub fn parse_prefix(text: &str) -> Result<IpNet, ValueError> {
    const EXPECTED: &str = "an address or a prefix such as 100.64.0.1, 10.0.0.0/8 or fd00::/8";
    let parsed = match text.parse::<IpAddr>() {
        Ok(IpAddr::V4(addr)) => Some(IpNet::V4(Ipv4Net::from(addr))),
        Ok(IpAddr::V6(addr)) => Some(IpNet::V6(Ipv6Net::from(addr))),
        Err(_) => text.parse::<IpNet>().ok(),
    };
    parsed.ok_or_else(|| ValueError::new(format!("'{text}' is not a prefix"), EXPECTED))
}

/// A prefix as [`parse_prefix`] reads it: an address bare, a network with its length.
pub fn prefix_text(prefix: &IpNet) -> String {
    match prefix.prefix_len() == prefix.max_prefix_len() {
        true => prefix.addr().to_string(),
        false => prefix.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(prefixes: &[&str]) -> AllowList {
        AllowList::new(prefixes.iter().map(|text| parse_prefix(text).unwrap())).unwrap()
    }

    #[test]
    fn empty_is_no_list() {
        assert_eq!(AllowList::new([]), None);
    }

    #[test]
    fn looks_up_both_families() {
        let list = list(&[
            "10.0.0.0/8",
            "10.1.0.0/16",
            "192.0.2.1",
            "fd00::/8",
            "::ffff:198.51.100.0/120",
        ]);
        for yes in [
            "10.0.0.0",
            "10.255.255.255",
            "192.0.2.1",
            "::ffff:10.2.3.4",
            "fd12::1",
            "198.51.100.9",
        ] {
            assert!(list.allows(yes.parse().unwrap()), "{yes}");
        }
        for no in [
            "9.255.255.255",
            "11.0.0.0",
            "192.0.2.2",
            "fe80::1",
            "::1",
            "198.51.101.0",
        ] {
            assert!(!list.allows(no.parse().unwrap()), "{no}");
        }
    }

    #[test]
    fn everyone_is_written_out() {
        let v4_only = list(&["0.0.0.0/0"]);
        assert!(v4_only.allows("255.255.255.255".parse().unwrap()));
        assert!(!v4_only.allows("2001:db8::1".parse().unwrap()));
    }
}
