//go:build soak

package e2e

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
	"golang.org/x/sys/unix"
)

var soakTime = flag.Duration("soak.time", 30*time.Minute, "how long TestSoak goes on")

// The memory that the guest's programs and their page cache have, in bytes:
// less than the files, so that the kernel must write back through the server in
// order to get any. The server is in the same group where the kernel lets it be
// an I/O flusher, and elsewhere in one of its own with the same limit, which
// holds its page cache of the image as well.
const soakMemory = 160 << 20

// soakPatience is how long one round of fio may take: many times what it takes
// on a busy machine.
const soakPatience = 4 * time.Minute

// TestSoak uses a loop-mounted guest filesystem hard and for a long time: fio
// writes and verifies, in little memory, while the server is stopped and
// continued at random and the guest discards. Nothing may get stuck (dirty
// pages that wait for a server that waits for memory), differ, or grow.
func TestSoak(t *testing.T) {
	imgtest.RequireFuse(t)
	imgtest.RequireLoop(t)
	imgtest.Require(t, "fio", "mkfs.ext4", "e2fsck", "fstrim", "mount", "qemu-img")
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) { soak(t, f, *soakTime/time.Duration(len(formats))) })
	}
}

func soak(t *testing.T, f format, length time.Duration) {
	image := f.create(t, workDir(t), 512<<20, true)
	m := mountImage(t, image, "-w", "--loop")
	imgtest.Run(t, "mkfs.ext4", "-q", m.loop)
	guest, umount := mountGuest(t, m.loop, "rw")
	server := serverPID(t, m.dir)
	group := newMemoryGroup(t, "guest", soakMemory)
	where, home := "the server in the same limit", group
	if !isFlusher(t, server) {
		where = "the server in a limit of its own of the same size (it lacks CAP_SYS_RESOURCE)"
		home = newMemoryGroup(t, "server", soakMemory)
	}
	home.add(t, server)

	keep := filepath.Join(guest, "keep")
	want := imgtest.PatternBytes(1, 0, 24<<20)
	if err := os.WriteFile(keep, want, 0o600); err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(length)
	ctx, cancel := context.WithDeadline(context.Background(), end)
	defer cancel()
	stops := 0
	var sizes, open []int64
	var wg sync.WaitGroup
	wg.Go(func() { stops = stopAndGo(ctx, server) })
	wg.Go(func() { sizes, open = watch(ctx, server) })
	defer func() { // whatever happens, it must not stay stopped
		cancel()
		wg.Wait()
	}()

	rounds, trimmed := 0, 0
	var moved int64
	rng := rand.New(rand.NewPCG(1, uint64(len(f.name))))
	for ; rounds == 0 || time.Now().Before(end); rounds++ {
		moved += fioRound(t, group, guest, rounds, rng)
		if rng.IntN(2) == 0 {
			imgtest.Run(t, "fstrim", guest)
			trimmed++
		}
		dropCaches(t)
		got, err := os.ReadFile(keep)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("round %d: the file that nobody touched: %d bytes, %v", rounds, len(got), err)
		}
	}
	cancel()
	wg.Wait()
	noGrowth(t, "memory", sizes, 16<<20)
	noGrowth(t, "descriptors and threads", open, 16)
	reached, refused := home.pressure(t)
	guestReached, guestRefused := group.pressure(t)
	umount()
	imgtest.Run(t, "e2fsck", "-fn", m.loop)
	m.unmount()
	f.check(t, image, false)
	fmt.Printf("soak: %s: %v, %d rounds of fio (%d MiB written and verified), %d stops of the server, %d trims; memory of the server %d to %d MiB, its descriptors and threads %d to %d; limit %d MiB, %s; most memory and times at the limit: guest %d MiB, %d, server %d MiB, %d; no difference\n",
		f.name, length.Round(time.Second), rounds, moved>>20, stops, trimmed, minOf(sizes)>>20, maxOf(sizes)>>20, minOf(open), maxOf(open),
		soakMemory>>20, where, guestReached>>20, guestRefused, reached>>20, refused)
	if guestRefused == 0 {
		t.Error("the guest never came to its limit: the soak shows nothing")
	}
}

// fioRound runs one job that writes and then verifies all of it, in the
// memory group; it must end.
func fioRound(t *testing.T, g *memoryGroup, guest string, round int, rng *rand.Rand) int64 {
	t.Helper()
	const size = 96 << 20
	file := fmt.Sprintf("f%d", rng.IntN(2))
	args := []string{"--name=v", "--directory=" + guest, "--filename=" + file, "--size=" + strconv.Itoa(size),
		"--rw=" + []string{"randwrite", "write"}[rng.IntN(2)], "--bs=" + []string{"4k", "16k", "64k", "4k-128k"}[rng.IntN(4)],
		"--ioengine=psync", "--direct=" + strconv.Itoa(rng.IntN(2)), "--fallocate=none", "--end_fsync=1",
		"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--randseed=" + strconv.Itoa(round+1)}
	if rng.IntN(3) == 0 { // elsewhere
		if err := os.Remove(filepath.Join(guest, file)); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), soakPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", `echo $$ >"$0" && exec fio "$@"`, g.procs()}, args...)...)
	cmd.WaitDelay = 5 * time.Second
	// Told before it is waited for: the kernel may not let go of it.
	stuck := context.AfterFunc(ctx, func() { fmt.Printf("soak: round %d: fio is stuck: %q\n%s\n", round, args, stuckTasks(g)) })
	out, err := cmd.CombinedOutput()
	if !stuck() {
		t.Fatalf("round %d: fio was stuck: %q\n%s", round, args, out)
	}
	if err != nil {
		t.Fatalf("round %d: fio %q: %v\n%s", round, args, err, out)
	}
	return size
}

// stuckTasks says where the kernel keeps the tasks of the group and those that
// wait for a disk.
func stuckTasks(g *memoryGroup) string {
	var b strings.Builder
	members, _ := os.ReadFile(g.procs())
	stacks, _ := filepath.Glob("/proc/[0-9]*/task/*/stack")
	for _, s := range stacks {
		pid := strings.Split(s, "/")[2]
		stat, _ := os.ReadFile(filepath.Join(filepath.Dir(s), "stat"))
		i := bytes.LastIndexByte(stat, ')')
		if i > 0 && (bytes.HasPrefix(stat[i:], []byte(") D")) || strings.Contains("\n"+string(members), "\n"+pid+"\n")) {
			stack, _ := os.ReadFile(s)
			fmt.Fprintf(&b, "%s\n%s\n", stat[:i+3], stack)
		}
	}
	return b.String()
}

// stopAndGo stops the server for moments until ctx ends.
func stopAndGo(ctx context.Context, pid int) (stops int) {
	rng := rand.New(rand.NewPCG(2, 2))
	pause := func(d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	for ctx.Err() == nil {
		pause(time.Duration(200+rng.IntN(2500)) * time.Millisecond)
		if unix.Kill(pid, unix.SIGSTOP) != nil {
			return stops
		}
		stops++
		pause(time.Duration(50+rng.IntN(1500)) * time.Millisecond)
		_ = unix.Kill(pid, unix.SIGCONT) // it is there: it was stopped
	}
	return stops
}

// watch is the anonymous memory of the server and its number of descriptors and
// threads, each half second.
func watch(ctx context.Context, pid int) (sizes, open []int64) {
	proc := fmt.Sprintf("/proc/%d", pid)
	for {
		status, err := os.ReadFile(proc + "/status")
		if err != nil {
			return sizes, open
		}
		for line := range strings.Lines(string(status)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "RssAnon:" {
				n, _ := strconv.ParseInt(f[1], 10, 64) // the kernel prints numbers
				sizes = append(sizes, n<<10)
			}
		}
		fds, err1 := os.ReadDir(proc + "/fd")
		threads, err2 := os.ReadDir(proc + "/task")
		if err1 == nil && err2 == nil {
			open = append(open, int64(len(fds)+len(threads)))
		}
		select {
		case <-ctx.Done():
			return sizes, open
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// noGrowth compares the second quarter of the time with the last: a leak goes
// on, a cache fills up.
func noGrowth(t *testing.T, what string, sizes []int64, slack int64) {
	t.Helper()
	n := len(sizes)
	if n < 8 {
		return
	}
	early, late := maxOf(sizes[n/4:n/2]), maxOf(sizes[3*n/4:])
	if late > early+early/2+slack {
		t.Errorf("of the server's %s there is more and more: %d, later %d", what, early, late)
	}
}

func maxOf(s []int64) (m int64) {
	for _, v := range s {
		m = max(m, v)
	}
	return m
}

func minOf(s []int64) int64 {
	m := maxOf(s)
	for _, v := range s {
		m = min(m, v)
	}
	return m
}

func dropCaches(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
		t.Logf("caches stay: %v", err)
	}
}

// isFlusher reports whether the kernel knows that the process writes back what
// others have in the page cache (PF_MEMALLOC_NOIO). Without that a server in
// the same limit as its users gets stuck, as it must.
func isFlusher(t *testing.T, pid int) bool {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	flags, err := strconv.ParseUint(fields[6], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	const noIO = 0x00080000
	return flags&noIO != 0
}

// memoryGroup is a cgroup, of either version, with a limit of memory.
type memoryGroup struct{ dir string }

func newMemoryGroup(t *testing.T, of string, limit int64) *memoryGroup {
	t.Helper()
	name := fmt.Sprintf("imagestack-soak-%s-%d", of, os.Getpid())
	for root, file := range map[string]string{"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"} {
		g := &memoryGroup{filepath.Join(root, name)}
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		if file == "memory.max" { // version 2: the controller has to be handed down
			_ = os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+memory"), 0)
		}
		if err := os.Mkdir(g.dir, 0o755); err != nil {
			continue
		}
		t.Cleanup(func() { g.remove(t, root) })
		if err := os.WriteFile(filepath.Join(g.dir, file), []byte(strconv.FormatInt(limit, 10)), 0); err == nil {
			return g
		}
	}
	t.Fatal("no cgroup with a memory limit can be made")
	return nil
}

func (g *memoryGroup) procs() string { return filepath.Join(g.dir, "cgroup.procs") }

func (g *memoryGroup) add(t *testing.T, pid int) {
	t.Helper()
	if err := os.WriteFile(g.procs(), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
}

// pressure is the most memory the group ever had, in bytes, and how often it
// came to its limit.
func (g *memoryGroup) pressure(t *testing.T) (most, refused int64) {
	t.Helper()
	for _, name := range []string{"memory.max_usage_in_bytes", "memory.peak"} {
		if b, err := os.ReadFile(filepath.Join(g.dir, name)); err == nil {
			most, _ = strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64) // the kernel prints numbers
		}
	}
	if b, err := os.ReadFile(filepath.Join(g.dir, "memory.failcnt")); err == nil {
		refused, _ = strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	} else if b, err := os.ReadFile(filepath.Join(g.dir, "memory.events")); err == nil {
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == "max" {
				refused, _ = strconv.ParseInt(f[1], 10, 64)
			}
		}
	}
	return most, refused
}

// remove takes the group away; who is still in it goes back to the root.
func (g *memoryGroup) remove(t *testing.T, root string) {
	if b, err := os.ReadFile(g.procs()); err == nil {
		for _, pid := range strings.Fields(string(b)) {
			_ = os.WriteFile(filepath.Join(root, "cgroup.procs"), []byte(pid), 0) // it may have ended
		}
	}
	for range 100 {
		if err := unix.Rmdir(g.dir); err == nil || err == syscall.ENOENT {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("cannot remove %s", g.dir)
}
