//! Metrics as Prometheus gets them, checked with its own `promtool`.

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use super::{Lab, v1};
use crate::support::net::wait_for;

const ADDR: &str = "127.0.0.1:9180";

/// Runs `promtool` on a text.
fn promtool(lab: &Lab, words: &str, text: &str) {
    let mut child = lab
        .host
        .command("promtool")
        .args(words.split(' '))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool: install prometheus (./tests/run.sh does)");
    let mut input = child.stdin.take().expect("stdin");
    input.write_all(text.as_bytes()).expect("write");
    drop(input);
    let output = child.wait_with_output().expect("promtool");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.is_empty(), "{said}\n{text}");
}

/// The value of one sample, by its name and labels as written.
fn sample(text: &str, name: &str) -> f64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
    value.parse().expect("a number")
}

#[test]
fn metrics_pass_promtool_and_count() {
    let lab = Lab::new();
    let _relay = lab.run(&format!("--metrics {ADDR}"));
    let scrape = || lab.host.run(&format!("curl -sSf http://{ADDR}/metrics"));
    let text = scrape();
    promtool(&lab, "check metrics", &text);
    let repairs = r#"mmproxy_pathway_repairs_total{mark="123",pathway="vps01",kind="rule"}"#;
    assert_eq!(sample(&text, repairs), 0.0);
    assert_eq!(
        sample(
            &text,
            r#"mmproxy_connections_accepted_total{instance="web"}"#
        ),
        0.0
    );
    assert_eq!(
        sample(
            &text,
            r#"mmproxy_pathway_in_place{mark="123",pathway="vps01"}"#
        ),
        1.0
    );
    assert_eq!(
        sample(
            &text,
            r#"mmproxy_instance_state{instance="web",state="running"}"#
        ),
        1.0
    );

    let _open = lab.client(&v1("192.0.2.7", 40_000), "hello");
    lab.nonsense();
    wait_for("the counters", || {
        sample(
            &scrape(),
            r#"mmproxy_relayed_bytes_total{instance="web",direction="to-client"}"#,
        ) == 5.0
    });
    let text = scrape();
    promtool(&lab, "check metrics", &text);
    assert_eq!(
        sample(&text, r#"mmproxy_connections_active{instance="web"}"#),
        1.0
    );
    assert_eq!(
        sample(
            &text,
            r#"mmproxy_connections_refused_total{instance="web",reason="no-header"}"#
        ),
        1.0
    );
    assert_eq!(
        sample(&text, r#"mmproxy_connect_seconds_count{instance="web"}"#),
        1.0
    );
    assert_eq!(
        sample(
            &text,
            r#"mmproxy_header_wait_seconds_bucket{le="+Inf",instance="web"}"#
        ),
        1.0
    );

    let open = lab.host.run(&format!(
        "curl -sSf -H Accept:application/openmetrics-text http://{ADDR}/metrics"
    ));
    assert!(open.ends_with("# EOF\n"), "{open}");
    assert!(open.contains("# TYPE mmproxy_build info\n"), "{open}");
}

/// Adds an instance of the other protocol.
fn with_udp(lab: &Lab) {
    let path = lab.host.dir().join("etc/instances.tsv");
    let lines = std::fs::read_to_string(path).expect("instances.tsv");
    let more = "dns\t123\t127.0.0.1:5353\t127.0.0.1\t53\t-\tprotocol=udp,udp-header=every\n";
    lab.host.write("etc/instances.tsv", lines + more);
}

#[test]
fn metrics_of_both_protocols_pass_promtool() {
    let lab = Lab::new();
    with_udp(&lab);
    let _relay = lab.run(&format!("--metrics {ADDR}"));
    let _open = lab.client(&v1("192.0.2.7", 40_000), "hello");
    let service = lab
        .host
        .enter(|| UdpSocket::bind("127.0.0.1:53"))
        .expect("bind");
    let proxy = lab
        .host
        .enter(|| UdpSocket::bind("127.0.0.1:0"))
        .expect("bind");
    // PROXY v2 for a datagram over IPv4, then the payload
    let mut datagram = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c".to_vec();
    datagram.extend([192, 0, 2, 7, 127, 0, 0, 1, 0x9c, 0x40, 0x14, 0xe9]);
    datagram.extend(b"query");
    proxy.send_to(&datagram, "127.0.0.1:5353").expect("send");
    let limit = Some(Duration::from_secs(10));
    service.set_read_timeout(limit).expect("time limit");
    let mut payload = [0; 16];
    let (length, client) = service.recv_from(&mut payload).expect("the datagram");
    assert_eq!(
        (&payload[..length], client.to_string().as_str()),
        (&b"query"[..], "192.0.2.7:40000")
    );

    let scrape = || lab.host.run(&format!("curl -sSf http://{ADDR}/metrics"));
    let counted = r#"mmproxy_relayed_datagrams_total{instance="dns",direction="to-target"}"#;
    wait_for("the datagram to be counted", || {
        sample(&scrape(), counted) == 1.0
    });
    let text = scrape();
    promtool(&lab, "check metrics", &text);
    for instance in ["web", "spare", "dns"] {
        let state = format!(r#"mmproxy_instance_state{{instance="{instance}",state="running"}}"#);
        assert_eq!(sample(&text, &state), 1.0);
    }
    assert!(
        !text.contains(r#"datagrams_total{instance="web""#),
        "{text}"
    );
}

#[test]
fn other_requests_and_silent_scrapers_are_turned_away() {
    let lab = Lab::new();
    let _relay = lab.run(&format!("--metrics {ADDR}"));
    let code = |words: &str| {
        lab.host
            .run(&format!("curl -s -o /dev/null -w %{{http_code}} {words}"))
    };
    assert_eq!(code(&format!("http://{ADDR}/")), "404");
    assert_eq!(code(&format!("-X POST http://{ADDR}/metrics")), "405");
    let connect = || {
        let stream = lab
            .host
            .enter(|| TcpStream::connect(ADDR))
            .expect("connect");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("time limit");
        stream
    };
    let _silent: Vec<TcpStream> = (0..8).map(|_| connect()).collect();
    let mut garbage = connect();
    garbage.write_all(&[0xff; 4096]).expect("write");
    let mut answer = Vec::new();
    let _ = garbage.read_to_end(&mut answer);
    assert!(!String::from_utf8_lossy(&answer).contains("200 OK"));
    assert_eq!(code(&format!("http://{ADDR}/metrics")), "200");
}

#[test]
fn a_unix_socket_serves_too() {
    let lab = Lab::new();
    let path = lab.host.dir().join("metrics.sock");
    let shown = path.display();
    let scrape = || {
        lab.host.run(&format!(
            "curl -sSf --unix-socket {shown} http://localhost/metrics"
        ))
    };
    let first = lab.run(&format!("--metrics {shown}"));
    assert!(scrape().contains("mmproxy_build_info"));
    // a process that was killed leaves the file: the next one takes its place
    drop(first);
    assert!(path.exists());
    let _second = lab.run(&format!("--metrics {shown}"));
    wait_for("the socket", || {
        lab.host
            .try_run(&format!(
                "curl -sf --unix-socket {shown} http://localhost/metrics"
            ))
            .status
            .success()
    });
}

#[test]
fn the_shipped_rules_and_dashboard_use_metrics_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rules = root.join("examples/prometheus/mmproxy.rules.yml");
    let lab = Lab::new();
    with_udp(&lab);
    let _relay = lab.run(&format!("--metrics {ADDR}"));
    lab.host
        .run(&format!("promtool check rules {}", rules.display()));
    let tests = root.join("examples/prometheus/mmproxy.rules.test.yml");
    lab.host
        .run(&format!("promtool test rules {}", tests.display()));

    let metrics = lab.host.run(&format!("curl -sSf http://{ADDR}/metrics"));
    let dashboard = std::fs::read_to_string(root.join("examples/grafana/mmproxy.json"));
    let dashboard = dashboard.expect("the dashboard");
    let _: serde_json::Value = serde_json::from_str(&dashboard).expect("JSON");
    let rules = std::fs::read_to_string(rules).expect("the rules");
    let mut checked = 0;
    for text in [&dashboard, &rules] {
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for name in words.filter(|word| word.starts_with("mmproxy_")) {
            let known = metrics.lines().any(|line| {
                let rest = line.strip_prefix(name);
                rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
            });
            assert!(known, "{name} is no metric of ours");
            checked += 1;
        }
    }
    assert!(checked > 20, "only {checked} names found");
}
