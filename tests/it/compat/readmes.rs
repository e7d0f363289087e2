//! The example invocation of each ancestor's README, on the routing that its README sets up.

use crate::relay::lab::Service;
use crate::support::net::Host;
use crate::udp::lab as udp;

use super::lab::{CLIENTS, Old};

#[test]
fn path_networks_go_mmproxy() {
    let old = Old::with_loopback_routing(123);
    let services = old.services(25578);
    old.lab
        .wks
        .write("path-prefixes.txt", "10.0.0.0/24\nfd00::/64\n");
    let _relay = old.run(
        "./go-mmproxy -l 0.0.0.0:25577 -4 127.0.0.1:25578 -6 [::1]:25578 --allowed-subnets ./path-prefixes.txt",
    );
    old.assert_seen("10.0.0.1:25577", &services);
    // Go's 0.0.0.0 takes IPv6 connections, too
    let others = ["203.0.113.8:40000", "[2001:db8:7::8]:40000"];
    old.assert_sees("[fd00::1]:25577", &services, others);
}

#[test]
fn kzemeks_go_mmproxy() {
    let old = Old::with_loopback_routing(123);
    let services = old.services(25578);
    let relay = old.run("go-mmproxy -l 0.0.0.0:25577 -4 127.0.0.1:25578 -6 [::1]:25578");
    assert!(relay.log().contains("no allow list"), "{}", relay.log());
    old.assert_seen("10.0.0.1:25577", &services);
    // and its unit, where the list has comments
    drop(relay);
    old.lab.wks.write(
        "net-prefixes.txt",
        "# This is a list\n10.0.0.0/24 # vps01\n",
    );
    let services = old.services(1000);
    let relay = old.run(
        "go-mmproxy -4 localhost:1000 -6 \"[::1]:1000\" -allowed-subnets net-prefixes.txt -l 0.0.0.0:1234",
    );
    assert!(!relay.log().contains("no allow list"), "{}", relay.log());
    old.assert_seen("10.0.0.1:1234", &services);
}

#[test]
fn kzemeks_containers() {
    // the relay's container has two networks, and is the way out of the service's
    let old = Old::new();
    let (wks, echo) = (&old.lab.wks, Host::new("echo"));
    wks.link("eth1", &["10.5.5.3/24"], &echo, "eth0", &["10.5.5.2/24"]);
    echo.ip("route add default via 10.5.5.3");
    // what its entry point does first
    wks.sysctl("net.ipv4.conf.all.route_localnet", "1");
    for words in [
        "iptables -t mangle -A OUTPUT -m mark --mark 123 -j CONNMARK --save-mark",
        "iptables -t mangle -A OUTPUT -m mark --mark 123 -j MARK --set-mark 0",
        "iptables -t mangle -A PREROUTING -m connmark --mark 123 -j CONNMARK --restore-mark",
        "ip rule add fwmark 123 lookup 100",
        "ip route add local 0.0.0.0/0 dev lo table 100",
    ] {
        wks.run(words);
    }
    let service = Service::echo(&echo, "0.0.0.0:9000");
    let relay = old.run("./go-mmproxy -l 0.0.0.0:1234 -4 10.5.5.2:9000 -p tcp -v 2 -mark 123");
    let _open = old.connect("10.0.0.1:1234".parse().unwrap(), CLIENTS[0]);
    assert_eq!(service.peer(), CLIENTS[0].parse().unwrap());
    // -v 2: all state changes
    relay.wait_log("203.0.113.7:40000");
}

#[test]
fn cloudflares_mmproxy_over_loopback() {
    let old = Old::with_loopback_routing(100);
    let services = old.services(22);
    old.lab
        .wks
        .write("allowed-networks.txt", "0.0.0.0/0\n::/0\n");
    let relay = old.run(
        "mmproxy --allowed-networks allowed-networks.txt -l 0.0.0.0:2222 -4 127.0.0.1:22 -6 [::1]:22",
    );
    let log = relay.log();
    assert!(log.contains("routing for mark 123 and table 100"), "{log}");
    for (client, service) in CLIENTS.into_iter().zip(&services) {
        let _open = old.connect("10.0.0.1:2222".parse().unwrap(), client);
        let client: std::net::SocketAddr = client.parse().unwrap();
        // only the address, as there, unless told otherwise
        assert_eq!(service.peer().ip(), client.ip());
    }
    drop(relay);
    let relay = old.run(
        "mmproxy --allowed-networks allowed-networks.txt -l 0.0.0.0:2222 -4 127.0.0.1:22 -6 [::1]:22 \
         --force-real-client-port --quiet",
    );
    assert!(!relay.log().contains("routing for"), "{}", relay.log());
    old.assert_seen("10.0.0.1:2222", &services);
}

#[test]
fn cloudflares_mmproxy_over_marks() {
    // it needs mark 123 although no flag says so
    let old = Old::new();
    old.route_marks();
    let wks = &old.lab.wks;
    let services = old.services(22);
    wks.write("networks.txt", "10.0.0.0/24\n");
    let relay = old.run("mmproxy -a networks.txt -l 0.0.0.0:2222 -4 127.0.0.1:22 -6 '[::1]:22'");
    assert!(relay.log().contains("mark 123 is set"), "{}", relay.log());
    old.assert_seen("10.0.0.1:2222", &services);
}

#[test]
fn mmproxy_rs() {
    let old = Old::with_loopback_routing(123);
    let service = udp::Service::echo(&old.lab.wks, "127.0.0.1:8081");
    let _relay = old.run("mmproxy -m 123 -l 10.0.0.1:8080 -4 127.0.0.1:8081 -p udp");
    let proxy = udp::Proxy::new(&old.lab.vps, "10.0.0.1:8080".parse().unwrap());
    proxy.exchange(CLIENTS[0], b"hello");
    assert_eq!(service.peer_of(b"hello"), CLIENTS[0].parse().unwrap());
}

#[test]
fn the_json_form() {
    let old = Old::with_loopback_routing(123);
    let services = old.services(2222);
    // as its README prints it: with a comma behind the last entry
    let file = old.lab.wks.write(
        "mmproxy.json",
        "{\n    \"router\": [\n        {\n            \"from\":\"0.0.0.0:1111\",\n            \
         \"to\":\"127.0.0.1:2222\"\n        }\n    ],\n    \"p\":\"tcp\",\n    \"mark\":0,\n    \"v\":0,\n    \
         \"listeners\":1,\n}\n",
    );
    let relay = old.run(&format!("/usr/local/bin/mmproxy -c {}", file.display()));
    assert!(relay.log().contains("no allow list"), "{}", relay.log());
    let _open = old.connect("10.0.0.1:1111".parse().unwrap(), CLIENTS[0]);
    assert_eq!(services[0].peer(), CLIENTS[0].parse().unwrap());
}
