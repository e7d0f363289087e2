//! `run --listen`: one relay without files.

use super::lab::{CLIENTS, Old};
use crate::udp::lab as udp;

#[test]
fn a_relay_with_a_pathway_of_its_own() {
    let old = Old::new();
    let services = old.services(2200);
    let words = "run --listen 10.0.0.1:2222 --target4 127.0.0.1:2200 --target6 [::1]:2200 --mark 123 \
                 --trust 10.0.0.2 --manage-pathways --name ssh --header-timeout 3s --port keep";
    let relay = old.lab.wks.spawn(old.lab.wks.mmproxyctl(words));
    relay.wait_log("ready");
    old.assert_seen("10.0.0.1:2222", &services);
    let status = old
        .lab
        .wks
        .mmproxyctl("status --json")
        .output()
        .expect("status");
    let shown = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(
        shown.contains("\"in-place\"") && shown.contains("\"ssh\""),
        "{shown}"
    );
}

#[test]
fn udp_without_a_mark() {
    let old = Old::with_loopback_routing(123);
    let service = udp::Service::echo(&old.lab.wks, "127.0.0.1:5300");
    let words = "run --listen 10.0.0.1:53 --target4 127.0.0.1:5300 --protocol udp --udp-header every \
                 --max-flows 10 --trust 10.0.0.2";
    let relay = old.lab.wks.spawn(old.lab.wks.mmproxyctl(words));
    relay.wait_log("ready");
    let proxy = udp::Proxy::new(&old.lab.vps, "10.0.0.1:53".parse().unwrap());
    proxy.exchange(CLIENTS[0], b"hello");
    assert_eq!(service.peer_of(b"hello"), CLIENTS[0].parse().unwrap());
}

#[test]
fn mistakes_say_which_flag() {
    let old = Old::new();
    for (words, said) in [
        ("run --listen 10.0.0.1:2222", "--target4"),
        ("run --target4 127.0.0.1:22", "--listen"),
        (
            "run --listen 10.0.0.1:2222 --all --target4 127.0.0.1:22",
            "--all",
        ),
        ("run ssh --protocol udp", "--listen"),
        (
            "run --listen 10.0.0.1:2222 --target4 127.0.0.1:22 --trust 10.0.0.2 --idle-timeout 3x",
            "'3x' is not",
        ),
        (
            "run --listen 10.0.0.1:2222 --target4 127.0.0.1:22 --trust 10.0.0.2 --max-flows 3",
            "means nothing for protocol=tcp",
        ),
        (
            "run --listen 10.0.0.1:53 --target4 127.0.0.1:53 --trust 10.0.0.2 --protocol udp \
             --max-flows 10 --max-flows-per-proxy 11",
            "expected a number from 1 to 10",
        ),
        (
            "run --listen 10.0.0.1:2222 --target4 127.0.0.1:22 --mark 0",
            "mark 0",
        ),
        (
            "run --listen 10.0.0.1:2222 --target4 127.0.0.1:22",
            "allow.txt",
        ),
    ] {
        let output = old.lab.wks.mmproxyctl(words).output().expect("mmproxyctl");
        let shown = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{words}: {shown}");
        assert!(shown.contains(said), "{words}: {shown}");
    }
    // a mark whose pathway is not there is refused as for any instance; what would make it is the flag, as
    // pathway add has nothing to read this from
    let words = "run --listen 10.0.0.1:2222 --target4 127.0.0.1:22 --trust 10.0.0.2 --mark 123";
    let output = old.lab.wks.mmproxyctl(words).output().expect("mmproxyctl");
    let shown = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{shown}");
    assert!(
        shown.contains("--manage-pathways") && !shown.contains("pathway add"),
        "{shown}"
    );
}
