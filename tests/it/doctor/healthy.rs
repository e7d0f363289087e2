//! No false alarm: sixteen cells, beside other programs' rules.

use std::time::{Duration, Instant};

use mmproxyctl::doctor::evidence::{Outcome, Place};
use mmproxyctl::model::Family;

use super::{ask, clinic};

/// What Tailscale 1.80 makes of a host, with its filters.
const TAILSCALE: &str = "
for ip in 'ip' 'ip -6'; do
    $ip rule add priority 5210 fwmark 0x80000/0xff0000 lookup main
    $ip rule add priority 5230 fwmark 0x80000/0xff0000 lookup default
    $ip rule add priority 5250 fwmark 0x80000/0xff0000 unreachable
    $ip rule add priority 5270 lookup 52
done
ip link add tailscale0 type veth peer name derp0; ip link set derp0 up; ip link set tailscale0 up
ip address add 100.101.102.123/32 dev tailscale0
ip route add 100.64.0.0/10 dev tailscale0 table 52
ip -6 route add fd7a:115c:a1e0::/48 dev tailscale0 table 52
for it in iptables ip6tables; do
    for chain in ts-input ts-forward; do $it -N $chain; done
    $it -I INPUT -j ts-input; $it -I FORWARD -j ts-forward
    $it -A ts-input -i tailscale0 -j ACCEPT
    $it -A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
    $it -A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT
    $it -A ts-forward -o tailscale0 -j ACCEPT
    $it -t nat -N ts-postrouting; $it -t nat -I POSTROUTING -j ts-postrouting
    $it -t nat -A ts-postrouting -m mark --mark 0x40000/0xff0000 -j MASQUERADE
done
iptables -I ts-input -s 100.101.102.123/32 -i lo -j ACCEPT
iptables -A ts-input -s 100.115.92.0/23 ! -i tailscale0 -j RETURN
iptables -A ts-input -s 100.64.0.0/10 ! -i tailscale0 -j DROP
iptables -A ts-forward -s 100.64.0.0/10 -o tailscale0 -j DROP
sysctl -qw net.ipv4.conf.all.src_valid_mark=1
";

/// What Docker 28 makes of a host with one published port.
const DOCKER: &str = "
sysctl -qw net.ipv4.ip_forward=1
iptables -P FORWARD DROP
for chain in DOCKER DOCKER-USER DOCKER-FORWARD DOCKER-BRIDGE DOCKER-CT; do iptables -N $chain; done
iptables -A FORWARD -j DOCKER-USER
iptables -A FORWARD -j DOCKER-FORWARD
iptables -A DOCKER-FORWARD -j DOCKER-CT
iptables -A DOCKER-FORWARD -j DOCKER-BRIDGE
iptables -A DOCKER-FORWARD -i br0 -j ACCEPT
iptables -A DOCKER-CT -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -A DOCKER-BRIDGE -o br0 -j DOCKER
iptables -A DOCKER -d 172.20.0.2/32 ! -i br0 -o br0 -p tcp -m tcp --dport 8080 -j ACCEPT
iptables -A DOCKER ! -i br0 -o br0 -j DROP
iptables -t nat -N DOCKER
iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
iptables -t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
iptables -t nat -A POSTROUTING -s 172.20.0.0/24 ! -o br0 -j MASQUERADE
iptables -t nat -A DOCKER ! -i br0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.20.0.2:8080
iptables -t raw -A PREROUTING -d 172.20.0.2/32 ! -i br0 -j DROP
";

/// Sixteen cells, each way proved, and not a word beside.
fn healthy(firewall: &str, beside: &str, notes: bool) {
    let scratch = tempfile::tempdir().unwrap();
    let clinic = clinic(scratch.path());
    clinic.run(beside).unwrap();
    let words = format!("mmproxyctl -q {firewall} pathway add --all");
    clinic.run(&words).unwrap();
    let start = Instant::now();
    let answer = ask(&clinic, "", firewall).unwrap();
    let took = start.elapsed();
    assert!(
        answer.healthy,
        "{:#?}\n{:#?}",
        answer.diagnoses, answer.evidence.instances
    );
    if !notes {
        assert_eq!(answer.diagnoses, [], "a healthy host has nothing to note");
    }
    let mut cells = Vec::new();
    for instance in &answer.evidence.instances {
        for target in &instance.targets {
            let back = match instance.protocol.as_str() {
                "tcp" => matches!(target.spoofed, Outcome::Open(_)),
                // the ICMP answer of a closed port came back
                _ => target.spoofed == Outcome::Refused,
            };
            assert!(back, "{}: {target:#?}", instance.name);
            cells.push((instance.name.clone(), target.family));
        }
    }
    assert_eq!(cells.len(), 16);
    for place in [Place::Loopback, Place::Own, Place::Remote] {
        let targets = answer
            .evidence
            .instances
            .iter()
            .flat_map(|one| &one.targets);
        let found = targets.filter(|one| one.place == place);
        assert!(
            found.filter(|one| one.family == Family::V6).count() >= 2,
            "{place:?}"
        );
    }
    eprintln!("doctor on 16 cells ({firewall} {}): {took:?}", beside.len());
    assert!(took < Duration::from_secs(15), "{took:?}");
}

#[test]
fn sixteen_cells_with_iptables() {
    healthy("", "", false);
}

#[test]
fn sixteen_cells_beside_tailscale_and_docker() {
    healthy("", &format!("{TAILSCALE}{DOCKER}"), true);
}

#[test]
fn sixteen_cells_with_nftables() {
    healthy("--firewall nftables", "", false);
}

#[test]
fn sixteen_cells_with_nftables_beside_tailscale_and_docker() {
    healthy("--firewall nftables", &format!("{TAILSCALE}{DOCKER}"), true);
}
