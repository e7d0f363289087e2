//! Every kind against every instance: right address, port and header, or a reason.

use super::*;
use crate::model::{InstanceOptions, ListenAddr};

fn instance(options: &str, listen: &str, targets: [bool; 2]) -> Instance {
    let words: Vec<(&str, &str)> = options
        .split(',')
        .filter_map(|word| word.split_once('='))
        .collect();
    let options: InstanceOptions = crate::config::from_words(&words).unwrap().0;
    Instance {
        name: "vps01-ssh".parse().unwrap(),
        mark: "123".parse().ok(),
        listen: ListenAddr::new(listen.parse().unwrap()).into(),
        target4: targets[0].then(|| "127.0.0.1:22".parse().unwrap()),
        target6: targets[1].then(|| "[::1]:22".parse().unwrap()),
        target_ports: crate::model::TargetPorts::One,
        named: crate::model::NamedTargets::default(),
        options,
    }
}

fn text(instance: &Instance, kind: Kind) -> Result<String, String> {
    let edge = Edge::of(instance, None, None).map_err(|error| error.to_string())?;
    snippet(instance, kind, edge).map_err(|error| error.to_string())
}

#[test]
fn address_port_and_header_of_every_kind() {
    let tcp = instance("", "100.64.0.1:2222", [true; 2]);
    for (kind, header) in [
        (
            Kind::Haproxy,
            "server vps01-ssh 100.64.0.1:2222 send-proxy-v2",
        ),
        (Kind::Haproxy, "bind :::22 v4v6"),
        (
            Kind::Nginx,
            "proxy_pass 100.64.0.1:2222;\n        proxy_protocol on;",
        ),
        (Kind::Nginx, "listen [::]:22 ipv6only=on"),
        (Kind::Traefik, "proxyProtocol:\n        version: 2"),
        (Kind::Caddy, "\"proxy_protocol\": \"v2\""),
        (Kind::Frp, "transport.proxyProtocolVersion = \"v2\""),
        (Kind::Frp, "localPort = 2222\nremotePort = 22\n"),
        (Kind::Envoy, "config: { version: V2 }"),
        (Kind::Envoy, "address: \"100.64.0.1\", port_value: 2222"),
        (Kind::Dnsdist, "tcpOnly = true"),
        (Kind::AwsNlb, "proxy_protocol_v2  = true"),
        (Kind::AwsNlb, "WARNING"),
        (Kind::Spectrum, "proxy_protocol = \"v2\""),
        (Kind::Spectrum, "protocol       = \"tcp/22\""),
    ] {
        let text = text(&tcp, kind).unwrap();
        assert!(text.contains(header), "{kind:?}: {header}\n{text}");
        assert!(text.contains("100.64.0.1"), "{kind:?}\n{text}");
    }
}

#[test]
fn only_the_families_that_are_served() {
    let v4 = instance("", "100.64.0.1:2222", [true, false]);
    let v6 = instance("", "[fd00::1]:2222", [false, true]);
    for (instance, kind, bind) in [
        (&v4, Kind::Haproxy, "bind 0.0.0.0:22\n"),
        (&v6, Kind::Haproxy, "bind :::22 v6only"),
        (
            &v6,
            Kind::Haproxy,
            "server vps01-ssh [fd00::1]:2222 send-proxy-v2",
        ),
        (&v4, Kind::Nginx, "listen 0.0.0.0:22"),
        (&v4, Kind::Caddy, "tcp4/0.0.0.0:22"),
        (&v6, Kind::Envoy, "address: \"::\", port_value: 22 }"),
        (&v6, Kind::Frp, "localIP = \"fd00::1\""),
        (&v6, Kind::AwsNlb, "ip_address_type    = \"ipv6\""),
    ] {
        let text = text(instance, kind).unwrap();
        assert!(text.contains(bind), "{kind:?}: {bind}\n{text}");
    }
    assert!(!text(&v4, Kind::Nginx).unwrap().contains("[::]"));
    assert!(text(&v4, Kind::Haproxy).unwrap().contains("no IPv6 target"));
}

#[test]
fn udp_by_who_sends_it() {
    let every = instance("protocol=udp", "100.64.0.1:5300", [true; 2]);
    let first = instance(
        "protocol=udp,udp-header=first",
        "100.64.0.1:5300",
        [true; 2],
    );
    let spp = instance("protocol=udp,udp-header=spp", "100.64.0.1:5300", [true; 2]);
    assert!(
        text(&every, Kind::Dnsdist)
            .unwrap()
            .contains("useProxyProtocol = true")
    );
    assert!(
        !text(&every, Kind::Dnsdist)
            .unwrap()
            .contains("tcpOnly = true")
    );
    assert!(text(&first, Kind::Frp).unwrap().contains("type = \"udp\""));
    assert!(text(&first, Kind::Spectrum).unwrap().contains("\"v2\""));
    assert!(text(&spp, Kind::Spectrum).unwrap().contains("\"simple\""));
    for (instance, kind, reason) in [
        (&every, Kind::Haproxy, "no PROXY header over UDP"),
        (&every, Kind::Nginx, "no PROXY header over UDP"),
        (&every, Kind::Envoy, "no PROXY header over UDP"),
        (&every, Kind::Frp, "needs udp-header=first"),
        (&every, Kind::Spectrum, "udp-header=spp"),
        (&first, Kind::Dnsdist, "needs udp-header=every"),
    ] {
        let error = text(instance, kind).unwrap_err();
        assert!(error.contains(reason), "{kind:?}: {error}");
    }
}

#[test]
fn a_wildcard_needs_an_address() {
    let any = instance("", "0.0.0.0:2222", [true; 2]);
    assert!(text(&any, Kind::Haproxy).unwrap_err().contains("--address"));
    let edge = Edge::of(&any, Some("100.64.0.9".parse().unwrap()), Some(2200)).unwrap();
    let text = snippet(&any, Kind::Haproxy, edge).unwrap();
    assert!(
        text.contains("100.64.0.9:2222") && text.contains("bind :::2200"),
        "{text}"
    );
}
