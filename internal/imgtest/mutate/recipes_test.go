package mutate

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

//go:generate go test -run TestRecipes -update

var update = flag.Bool("update", false, "record the filesystems anew")

// recipes make what is recorded in testdata. FILE stands for the image.
var recipes = map[string][]string{
	"ext2":          {"truncate -s 4M FILE", "mke2fs -q -F -t ext2 -b 1024 -N 32 FILE"},
	"ext4-clean":    {"truncate -s 20M FILE", "mke2fs -q -F -t ext4 -b 1024 -N 96 -J size=1 -O metadata_csum,64bit FILE"},
	"ext4-dirty":    {"truncate -s 10M FILE", "mke2fs -q -F -t ext4 -b 1024 -N 64 -J size=1 -O metadata_csum,64bit FILE", journalOf("jo -c")},
	"ext4-v2":       {"truncate -s 10M FILE", "mke2fs -q -F -t ext4 -b 1024 -N 64 -J size=1 -O metadata_csum,^64bit FILE", journalOf("jo -c -v 2")},
	"ext4-gdt":      {"truncate -s 10M FILE", "mke2fs -q -F -t ext3 -b 1024 -N 64 -J size=1 FILE", journalOf("jo")},
	"ext4-bigalloc": {"truncate -s 40M FILE", "mke2fs -q -F -t ext4 -b 4096 -N 32 -J size=4 -O bigalloc,metadata_csum,64bit -C 16384 FILE"},
	"xfs":           {"truncate -s 34M FILE", "mkfs.xfs -q -f --unsupported -d agcount=2 -m crc=1,rmapbt=0,reflink=0 FILE"},
	"xfs-v4":        {"truncate -s 34M FILE", "mkfs.xfs -q -f --unsupported -d agcount=2 -m crc=0 -n ftype=0 FILE"},
	"swap":          {"truncate -s 64K FILE", "mkswap -q FILE"},
}

// journalOf leaves three transactions in the journal, one of which revokes.
func journalOf(open string) string {
	return "debugfs -w FILE " + strings.Join([]string{open, "jw -b 3000,3001,3002 FILE.data", "jc", open, "jw -r 3001,3050", "jc",
		open, "jw -b 3002,3003 FILE.data", "jc"}, "|")
}

// The recordings can be made anew.
func TestRecipes(t *testing.T) {
	imgtest.Require(t, "mke2fs", "debugfs", "mkfs.xfs", "mkswap")
	if len(recipes) != len(recordings) {
		t.Errorf("%d recipes, %d recordings", len(recipes), len(recordings))
	}
	for _, r := range recordings {
		path := filepath.Join(t.TempDir(), "fs")
		if err := os.WriteFile(path+".data", imgtest.PatternBytes(1, 0, 3<<10), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, line := range recipes[r.name] {
			line = strings.ReplaceAll(line, "FILE", path)
			words := strings.Fields(line)
			if words[0] == "debugfs" {
				script := strings.Join(words[3:], " ")
				if err := os.WriteFile(path+".cmds", []byte(strings.ReplaceAll(script, "|", "\n")+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				words = []string{"debugfs", "-w", "-f", path + ".cmds", path}
			}
			imgtest.Run(t, words[0], words[1:]...)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		st, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		s, err := ReadSparse(f, st.Size())
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		if *update {
			w, err := os.Create(filepath.Join("testdata", r.name+".gz"))
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Save(w); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
		}
		g := &Guest{Name: r.name, Image: s, Marks: map[string]int64{}}
		if err := r.parse(g); err != nil {
			t.Errorf("%s: %v", r.name, err)
		}
		t.Logf("%s: %d KiB kept, %d fields, %d checksums", r.name, len(s.own), len(g.fields), len(g.sums))
		// Where nothing was changed there is nothing to fix.
		c := s.Clone()
		g.Fix(c)
		for n, u := range c.own {
			if string(s.Bytes(n*unit, unit)) != string(u[:]) {
				t.Errorf("%s: a checksum of the recording would be changed in unit %d", r.name, n)
			}
		}
	}
}
