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

// The memory that the guest's programs, their page cache and the server have
// together, in bytes: less than the files, so that the kernel must write back
// through the server in order to get any.
const soakMemory = 160 << 20

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
	group := newMemoryGroup(t, soakMemory)
	where := "with the server in the same limit"
	if isFlusher(t, server) {
		group.add(t, server)
	} else {
		where = "with the server outside of the limit (it lacks CAP_SYS_RESOURCE)"
	}

	keep := filepath.Join(guest, "keep")
	want := imgtest.PatternBytes(1, 0, 24<<20)
	if err := os.WriteFile(keep, want, 0o600); err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(length)
	ctx, cancel := context.WithDeadline(context.Background(), end)
	defer cancel()
	stops := 0
	var sizes []int64
	var wg sync.WaitGroup
	wg.Go(func() { stops = stopAndGo(ctx, server) })
	wg.Go(func() { sizes = watchMemory(ctx, server) })
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
	noGrowth(t, sizes)
	umount()
	imgtest.Run(t, "e2fsck", "-fn", m.loop)
	m.unmount()
	f.check(t, image, false)
	fmt.Printf("soak: %s: %v, %d rounds of fio (%d MiB written and verified), %d stops of the server, %d trims, memory of the server %d to %d MiB, limit %d MiB, %s\n",
		f.name, length.Round(time.Second), rounds, moved>>20, stops, trimmed, minOf(sizes)>>20, maxOf(sizes)>>20, soakMemory>>20, where)
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
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
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

// watchMemory is the anonymous memory of the server, each half second.
func watchMemory(ctx context.Context, pid int) (sizes []int64) {
	for {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return sizes
		}
		for line := range strings.Lines(string(status)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "RssAnon:" {
				n, _ := strconv.ParseInt(f[1], 10, 64)
				sizes = append(sizes, n<<10)
			}
		}
		select {
		case <-ctx.Done():
			return sizes
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// noGrowth compares the second quarter of the time with the last: a leak goes
// on, a cache fills up.
func noGrowth(t *testing.T, sizes []int64) {
	t.Helper()
	n := len(sizes)
	if n < 8 {
		return
	}
	early, late := maxOf(sizes[n/4:n/2]), maxOf(sizes[3*n/4:])
	if late > early+early/2+16<<20 {
		t.Errorf("the server's memory grows: %d MiB, later %d MiB", early>>20, late>>20)
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

func newMemoryGroup(t *testing.T, limit int64) *memoryGroup {
	t.Helper()
	name := fmt.Sprintf("imagestack-soak-%d", os.Getpid())
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
