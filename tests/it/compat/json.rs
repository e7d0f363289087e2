//! The JSON form: several routes in one process, reloads, and an allow list under the new name.

use nix::sys::signal::Signal;

use crate::support::net::wait_for;

use super::lab::{CLIENTS, Old};

const TWO_ROUTES: &str = r#"{ /* ssh and web */
  "router": [
    {"from": "10.0.0.1:1111", "to": "0.0.0.0:2222", "to6": "[::1]:2222"}, // as 127.0.0.1
    {"from": "10.0.0.1:1112", "to": "127.0.0.1:2223"},
  ],
  "p": "tcp", "mark": 0, "v": 1, "listeners": 2,
}"#;

#[test]
fn several_routes_in_one_process_and_another_after_a_reload() {
    let old = Old::with_loopback_routing(123);
    let (first, second) = (old.services(2222), old.services(2223));
    let file = old.lab.wks.write("mmproxy.json", TWO_ROUTES);
    let relay = old.run(&format!("mmproxy -c {}", file.display()));
    old.assert_seen("10.0.0.1:1111", &first);
    let _open = old.connect("10.0.0.1:1112".parse().unwrap(), CLIENTS[0]);
    assert_eq!(second[0].peer(), CLIENTS[0].parse().unwrap());
    let one_more = TWO_ROUTES.replace(
        "  ],",
        "    {\"from\": \"10.0.0.1:1113\", \"to\": \"127.0.0.1:2222\", \"to6\": \"[::1]:2222\"} ],",
    );
    old.lab.wks.write("mmproxy.json", one_more);
    relay.signal(Signal::SIGHUP);
    relay.wait_log("reloaded");
    old.assert_seen("10.0.0.1:1113", &first);
}

#[test]
fn under_its_new_name_it_demands_an_allow_list() {
    let old = Old::with_loopback_routing(123);
    let services = old.services(2222);
    let file = old.lab.wks.write("mmproxy.json", TWO_ROUTES);
    let run = format!("run --json-config {}", file.display());
    let refused = old.lab.wks.mmproxyctl(&run).output().expect("mmproxyctl");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("allow.txt"), "{said}");
    let relay = old.lab.wks.spawn(
        old.lab
            .wks
            .mmproxyctl(&format!("{run} --trust 10.0.0.0/24")),
    );
    relay.wait_log("ready");
    old.assert_seen("10.0.0.1:1111", &services);
    let status = old.lab.wks.mmproxyctl("status").output().expect("status");
    let shown = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(shown.contains("tcp-10.0.0.1-1112  -"), "{shown}");
    wait_for("no mark", || shown.contains("no mark"));
}

#[test]
fn a_mistake_is_shown_with_its_place() {
    let old = Old::new();
    old.lab.wks.write(
        "bad.json",
        "{\n  \"router\": [\n    {\"from\": \"1111\", \"to\": \"127.0.0.1:2222\"}\n  ]\n}\n",
    );
    old.assert_ends("mmproxy -c bad.json", 2, "bad.json:3:14");
    old.assert_ends("mmproxy -c missing.json", 2, "cannot read missing.json");
}
