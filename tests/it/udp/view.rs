//! What a running process shows of its flows, and their end by command.

use serde_json::Value;

use super::cells::run;
use super::lab::{announce, wait_sockets_to};
use super::run::{PORT, Rig};
use crate::support::net::{Host, wait_for};

fn json(host: &Host, words: &str) -> Value {
    let output = host.mmproxyctl(&format!("{words} --json")).output();
    let output = output.expect("mmproxyctl");
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{words}: {error}: {output:?}"))
}

fn text(host: &Host, words: &str) -> String {
    let output = host.mmproxyctl(words).output().expect("mmproxyctl");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn flows_are_listed_explained_and_killed() {
    for options in ["", ",udp-header=first"] {
        let rig = Rig::new(options);
        let _relay = rig.start();
        let proxy = rig.proxy();
        let other = rig.proxy();
        proxy.exchange("203.0.113.7:4000", b"hello");
        other.exchange("203.0.113.8:4001", b"hello, too");
        let listing = json(&rig.wks, "conns");
        assert_eq!(listing["total"], 2, "{listing}");
        let of = |client: &str| {
            let rows = listing["connections"].as_array().expect("rows");
            rows.iter()
                .find(|row| row["client"] == client)
                .unwrap_or_else(|| panic!("no {client}: {listing}"))
        };
        let row = of("203.0.113.7:4000");
        assert_eq!(row["proxy"], proxy.addr().to_string());
        assert_eq!(row["local"], "203.0.113.7:4000");
        assert_eq!(row["target"], rig.service.addr.to_string());
        assert_eq!(row["stage"], "relaying");
        assert_eq!(row["header"], 2);
        assert_eq!(
            (&row["bytes_to_target"], &row["bytes_to_client"]),
            (&5.into(), &5.into())
        );
        assert_eq!(of("203.0.113.8:4001")["bytes_to_client"], 10);
        let shown = text(&rig.wks, "conns echo");
        assert!(shown.contains("203.0.113.7:4000"), "{shown}");
        let explained = text(&rig.wks, "explain 203.0.113.7:4000");
        assert!(
            explained.contains("open for") && explained.contains("instance  echo"),
            "{explained}"
        );

        let killed = text(&rig.wks, "conns kill --client 203.0.113.7");
        assert!(killed.contains("1 connection ended"), "{killed}");
        wait_sockets_to(&rig.wks, rig.service.addr, 1);
        assert_eq!(json(&rig.wks, "conns")["total"], 1);
        let explained = text(&rig.wks, "explain 203.0.113.7");
        assert!(
            explained.contains("ended") && explained.contains("killed"),
            "{explained}"
        );
        // the other one goes on, and the client may come again
        other.send(&[&announce("203.0.113.8:4001"), b"still here"]);
        assert_eq!(other.answer(), b"still here");
        proxy.exchange("203.0.113.7:4000", b"back");
        let status = json(&rig.wks, "status echo");
        let datagrams = &status[0]["instances"][0]["datagrams"];
        assert_eq!(datagrams["ended"]["killed"], 1, "{status}");
        assert_eq!(datagrams["flows"], 2, "{status}");
        let shown = text(&rig.wks, "status echo");
        assert!(
            shown.contains("udp") || shown.contains("datagrams"),
            "{shown}"
        );
    }
}

/// How a flow ended is remembered for whoever finds its address in the service's log.
#[test]
fn a_flow_that_ended_is_explained() {
    let rig = Rig::new(",idle-timeout=200ms,udp-header=spp");
    let _relay = rig.start();
    let proxy = rig.proxy();
    let header = mmproxyctl::relay::spp::Spp::new(
        "203.0.113.7:4000".parse().expect("an address"),
        "198.51.100.1:53".parse().expect("an address"),
    );
    proxy.send(&[header.bytes(), b"hello"]);
    proxy.answer();
    wait_for("the end of the flow", || {
        json(&rig.wks, "conns")["total"] == 0
    });
    let explained = json(&rig.wks, "explain 203.0.113.7:4000");
    let ended = &explained["ended"][0];
    assert_eq!(ended["client"], "203.0.113.7:4000", "{explained}");
    assert_eq!(ended["local"], "203.0.113.7:4000");
    assert_eq!(ended["ended"]["reason"], "idle");
    assert_eq!(ended["bytes_to_target"], 5);
    assert_eq!(ended["header"], "spp");
    let explained = text(&rig.wks, "explain 203.0.113.7:4000");
    assert!(
        explained.contains(&format!("proxy     {}, SPP\n", proxy.addr())),
        "{explained}"
    );
    // each time anew, as it ends so soon
    wait_for("the flow among the open ones", || {
        proxy.send(&[header.bytes(), b"hello again"]);
        proxy.answer();
        text(&rig.wks, "conns").contains(" SPP")
    });
}

#[test]
fn flows_and_datagrams_in_the_metrics() {
    let rig = Rig::new("");
    let _relay = run(&rig.wks, "run echo --metrics 127.0.0.1:9180", &[PORT]);
    let proxy = rig.proxy();
    proxy.exchange("203.0.113.7:4000", b"hello");
    proxy.exchange("203.0.113.8:4000", b"hello");
    proxy.send(&[&announce("203.0.113.7:4000")]);
    proxy.send(&[b"no header"]);
    proxy.exchange("203.0.113.7:4000", b"again");
    let text = rig.wks.run("curl -sSf http://127.0.0.1:9180/metrics");
    let instance = "instance=\"echo\"";
    for line in [
        format!("mmproxy_connections_active{{{instance}}} 2"),
        format!("mmproxy_connections_accepted_total{{{instance}}} 2"),
        format!("mmproxy_relayed_datagrams_total{{{instance},direction=\"to-target\"}} 3"),
        format!("mmproxy_relayed_datagrams_total{{{instance},direction=\"to-client\"}} 3"),
        format!("mmproxy_relayed_bytes_total{{{instance},direction=\"to-client\"}} 15"),
        format!("mmproxy_dropped_datagrams_total{{{instance},reason=\"no-payload\"}} 1"),
        format!("mmproxy_connections_refused_total{{{instance},reason=\"no-header\"}} 1"),
        format!("mmproxy_flows_ended_total{{{instance},reason=\"idle\"}} 0"),
        format!("mmproxy_receive_buffer_overflows_total{{{instance},direction=\"to-target\"}} 0"),
    ] {
        assert!(
            text.lines().any(|shown| shown == line),
            "no {line} in\n{text}"
        );
    }
}
