//! A network that has an address of this host's own: what happens to services there, and who says so.

use super::*;

/// The interface to the proxy has 10.0.0.1.
const NETWORK: &str = "own\t123\t10.0.0.0/24:7700\t10.1.0.2\t7000\t-\tlisten=transparent\n";

#[test]
fn whoever_would_lose_a_service_is_warned() {
    for backend in [Backend::Iptables, Backend::Nftables] {
        let rig = Rig::new(backend).with(NETWORK);
        let said = rig.said("check");
        for text in [
            "instances.tsv:1:9",
            "the network has this host's own 10.0.0.1: whatever of this host uses tcp port 7700 there",
        ] {
            assert!(said.contains(text), "no {text}: {said}");
        }
        let json = String::from_utf8(rig.command("check --json").output().expect("check").stdout);
        let json: serde_json::Value = serde_json::from_str(&json.expect("UTF-8")).expect("JSON");
        assert_eq!(json["valid"], true);
        assert_eq!(json["diagnostics"][0]["severity"], "warning", "{json}");

        let _service = Service::echo(&rig.wks, "0.0.0.0:7700");
        let reached = || {
            let to = addr("10.0.0.1:7700");
            let stream = rig.vps.enter(|| TcpStream::connect_timeout(&to, A_WHILE));
            stream.ok()
        };
        let mut open = reached().expect("the service");
        open.set_read_timeout(Some(SOON)).expect("read timeout");
        assert!(says(&mut open));
        for verb in ["check", "pathway add --all", "doctor"] {
            let (_, said) = rig.ctl(verb);
            let named = format!(
                "(pid {}) is cut off from others at port 7700",
                std::process::id()
            );
            assert!(said.contains(&named), "{verb}: no {named}: {said}");
        }
        // it is as was said
        assert!(reached().is_none(), "{backend:?}");
        open.set_read_timeout(Some(A_WHILE)).expect("read timeout");
        assert!(!says(&mut open), "{backend:?}");
        rig.said("pathway del --all");
        assert!(reached().is_some(), "{backend:?}");
    }
}

#[test]
fn nobody_is_warned_who_loses_nothing() {
    let single = "own\t123\t10.0.0.1:7700-7799\t10.1.0.2\t7000\t-\tlisten=transparent\n";
    let rig = Rig::new(Backend::Nftables).with(&format!("{LINES}{single}"));
    let _elsewhere = Service::echo(&rig.wks, "0.0.0.0:7800");
    // the relays' own sockets among them
    let _relays = rig.run("run --all --manage-pathways");
    let (_, out, err) = finish(rig.command("check"));
    assert!(err.is_empty(), "{err}{out}");
    // one address is meant, unless somebody is there
    let _service = Service::echo(&rig.wks, "10.0.0.1:7710");
    let said = rig.said("check");
    assert!(
        said.contains("at port 7710 of this host's own 10.0.0.1:"),
        "{said}"
    );
}
