//! A workload host with the links, an echo service in both families, and a proxy's host.

use std::path::PathBuf;
use std::process::Command;

use crate::relay::lab::{Lab, SOON, Service, announce, exchange};
use crate::support::net::Running;

use std::io::Write;
use std::net::{SocketAddr, TcpStream};

/// One client of each family.
pub(crate) const CLIENTS: [&str; 2] = ["203.0.113.7:40000", "[2001:db8:7::7]:40000"];

/// The hosts, and where the links are.
pub(crate) struct Old {
    pub(crate) lab: Lab,
    links: PathBuf,
}

impl Old {
    /// Without any routing.
    pub(crate) fn new() -> Self {
        let lab = Lab::without_pathway();
        lab.wks.ip("route add default via 10.0.0.2");
        lab.wks.ip("-6 route add default via fd00::2");
        let links = lab.wks.dir().join("bin");
        std::fs::create_dir_all(&links).expect("a directory");
        let old = Self { lab, links };
        let made = old
            .lab
            .wks
            .mmproxyctl(&format!("link --dir {}", old.links.display()))
            .output()
            .expect("mmproxyctl");
        assert!(made.status.success(), "{made:?}");
        old
    }

    /// The second recipe of cloudflare/mmproxy's README, which marks.
    pub(crate) fn route_marks(&self) {
        let wks = &self.lab.wks;
        wks.sysctl("net.ipv4.conf.eth0.route_localnet", "1");
        for program in ["iptables", "ip6tables"] {
            let comment = "-m comment --comment mmproxy -j CONNMARK";
            wks.run(&format!(
                "{program} -t mangle -I PREROUTING -m mark --mark 123 {comment} --save-mark"
            ));
            wks.run(&format!(
                "{program} -t mangle -I OUTPUT -m connmark --mark 123 {comment} --restore-mark"
            ));
        }
        for words in [
            "rule add fwmark 123 lookup 100",
            "-6 rule add fwmark 123 lookup 100",
            "route add local 0.0.0.0/0 dev lo table 100",
            "-6 route add local ::/0 dev lo table 100",
        ] {
            wks.ip(words);
        }
    }

    /// The routing of go-mmproxy's, mmproxy-rs's and the JSON form's READMEs, and cloudflare's first.
    pub(crate) fn with_loopback_routing(table: u32) -> Self {
        let old = Self::new();
        for words in [
            format!("rule add from 127.0.0.1/8 iif lo table {table}"),
            format!("route add local 0.0.0.0/0 dev lo table {table}"),
            format!("-6 rule add from ::1/128 iif lo table {table}"),
            format!("-6 route add local ::/0 dev lo table {table}"),
        ] {
            old.lab.wks.ip(&words);
        }
        old
    }

    pub(crate) fn link(&self, name: &str) -> PathBuf {
        self.links.join(name)
    }

    /// A command line that begins with an old name, from the host's own directory.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut words = shlex::split(line).expect("words").into_iter();
        let name = words.next().expect("a name");
        let name = name.rsplit('/').next().expect("a name").to_owned();
        let mut command = self.lab.wks.command(self.link(&name));
        command
            .args(words)
            .current_dir(self.lab.wks.dir())
            .env_remove("MMPROXY_CONFIG_DIR")
            .env_remove("ALLOW_LIST_PATH")
            .env("RUNTIME_DIRECTORY", self.lab.wks.dir().join("run"));
        command
    }

    /// A command line that relays once it says so.
    pub(crate) fn run(&self, line: &str) -> Running {
        let running = self.lab.wks.spawn(self.command(line));
        running.wait_log("ready");
        running
    }

    /// A service that echoes in both families on this port.
    pub(crate) fn services(&self, port: u16) -> [Service; 2] {
        ["127.0.0.1", "[::1]"].map(|host| Service::echo(&self.lab.wks, &format!("{host}:{port}")))
    }

    /// A connection through the relay at this address.
    pub(crate) fn connect(&self, relay: SocketAddr, client: &str) -> TcpStream {
        let mut stream = self.lab.dial(relay);
        stream
            .write_all(&announce(client))
            .expect("send the header");
        exchange(&mut stream, b"hello");
        stream
    }

    /// Clients of both families come through, and the services see them.
    pub(crate) fn assert_seen(&self, relay: &str, services: &[Service; 2]) {
        self.assert_sees(relay, services, CLIENTS);
    }

    /// The same for these clients.
    pub(crate) fn assert_sees(&self, relay: &str, services: &[Service; 2], clients: [&str; 2]) {
        for (client, service) in clients.into_iter().zip(services) {
            let relay = relay.parse().expect("an address");
            let _open = self.connect(relay, client);
            assert_eq!(service.peer(), client.parse().expect("an address"));
        }
    }

    /// Fails unless it ends soon, with this code, having said this.
    pub(crate) fn assert_ends(&self, line: &str, code: i32, said: &str) {
        let mut running = self.lab.wks.spawn(self.command(line));
        let status = running.wait(SOON);
        assert_eq!(status.code(), Some(code), "{line}: {}", running.log());
        assert!(running.log().contains(said), "{line}: {}", running.log());
    }
}
