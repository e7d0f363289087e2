//! Names of hosts, in a hosts file that changes while the relay runs.

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;

use super::Rig;
use crate::relay::lab::{Service, announce};

const PORT: u16 = 7777;
const CLIENT: &str = "192.0.2.7:4000";
const CLIENT6: &str = "[2001:db8::7]:4000";

/// Writes the hosts file in place, as a bind mount needs it.
fn hosts(rig: &Rig, lines: &str) -> PathBuf {
    rig.wks.write("hosts", lines)
}

/// The program under test, for which the file is /etc/hosts.
fn seeing(rig: &Rig, hosts: &PathBuf, words: &str) -> Command {
    let program = rig.wks.mmproxyctl(words);
    let mut command = rig.wks.command("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg("mount --bind \"$0\" /etc/hosts && exec \"$@\"")
        .arg(hosts)
        .arg(program.get_program())
        .args(program.get_args());
    command
}

fn relayed(rig: &Rig, service: &Service, client: &str) -> TcpStream {
    let mut stream = rig.dial("10.0.0.1:2222");
    crate::listen::relayed(&mut stream, &announce(client));
    assert_eq!(service.peer(), client.parse().expect("an address"));
    stream
}

#[test]
fn the_relay_and_its_pathway_follow_a_name() {
    let rig = Rig::new(&format!(
        "db\t123\t10.0.0.1:2222\tdb.test\t{PORT}\tdb.test\tresolve=1s\n"
    ));
    rig.wks.address("eth0", "10.0.0.3/24");
    rig.wks.address("eth0", "fd00::3/64");
    let service = |at: &str| Service::echo(&rig.wks, &format!("{at}:{PORT}"));
    let (old, new) = (service("10.0.0.1"), service("10.0.0.3"));
    let (old6, new6) = (service("[fd00::1]"), service("[fd00::3]"));
    let file = hosts(&rig, "10.0.0.1 db.test\nfd00::1 db.test\n");
    let relay = rig.run(seeing(&rig, &file, "run --all --manage-pathways"));
    let mut open = relayed(&rig, &old, CLIENT);
    relayed(&rig, &old6, CLIENT6);
    hosts(&rig, "10.0.0.3 db.test\nfd00::3 db.test\n");
    rig.wait_targets("10.0.0.3:7777");
    rig.wait_targets("[fd00::3]:7777");
    relayed(&rig, &new, CLIENT);
    relayed(&rig, &new6, CLIENT6);
    // what was open goes on: the pathway still leads to the old address
    crate::listen::relayed(&mut open, b"");
    let rules = rig.wks.ip("rule");
    for addr in ["10.0.0.1", "10.0.0.3"] {
        assert!(
            rules.contains(&format!("from {addr} fwmark 0x7b")),
            "{rules}"
        );
    }
    // a name that is gone keeps its last address
    hosts(&rig, "127.0.0.1 localhost\n");
    relay.wait_log("the last address is kept");
    relayed(&rig, &new, "192.0.2.7:4001");
    // several addresses, in whatever order: the one in use stays
    hosts(
        &rig,
        "10.0.0.1 db.test\n10.0.0.3 db.test\nfd00::3 db.test\n",
    );
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert!(rig.targets().contains("10.0.0.3:7777"), "{}", rig.targets());
}

#[test]
fn a_name_without_an_address_is_said_and_taken_up_later() {
    let rig = Rig::new(&format!(
        "db\t123\t10.0.0.1:2222\tdb.test\t{PORT}\t-\tresolve=1s\n"
    ));
    let service = Service::echo(&rig.wks, &format!("10.0.0.1:{PORT}"));
    let file = hosts(&rig, "127.0.0.1 localhost\n");
    // the road of everything else is built all the same
    let output = seeing(&rig, &file, "pathway add --all")
        .output()
        .expect("run");
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("the target db.test has no IPv4 address"),
        "{said}"
    );
    assert!(!rig.wks.ip("rule").contains("from 10.0.0.1"));
    let relay = rig.run(seeing(&rig, &file, "run --all --manage-pathways"));
    let mut refused = rig.dial("10.0.0.1:2222");
    std::io::Write::write_all(&mut refused, &announce(CLIENT)).expect("send");
    relay.wait_log("the target db.test has no IPv4 address");
    hosts(&rig, "10.0.0.1 db.test\n");
    rig.wait_targets("10.0.0.1:7777");
    relayed(&rig, &service, "192.0.2.7:4001");
    // the command by itself finds it, too
    let output = seeing(&rig, &file, "pathway check").output().expect("run");
    assert!(output.status.success(), "{output:?}");
}
