package open_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
)

// members are the parts of one image.
func members(t *testing.T, path string, dirs ...string) []open.Member {
	t.Helper()
	m, err := open.MembersOf([]string{path}, nil, dirs...)
	if err != nil || len(m.Unclear) != 0 {
		t.Fatalf("%+v, %v", m, err)
	}
	return m.Of[0]
}

func TestMembersOf(t *testing.T) {
	dir := t.TempDir()
	if err := ploop.CreateBundle(context.Background(), dir, ploop.CreateOptions{Size: 1 << 20, ClusterSize: ploop.MinCluster}); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(dir, ploop.RootName)
	if m := members(t, root); len(m) != 1 || m[0].Images != 1 || len(m[0].Children) != 0 || len(m[0].Parents) != 0 {
		t.Errorf("%+v", m)
	}
	other := filepath.Join(dir, "other.hds")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(other, "x")
	if m := members(t, other); m != nil {
		t.Errorf("not in the bundle: %+v", m)
	}
	if m, err := open.MembersOf([]string{filepath.Join(t.TempDir(), "alone.hds")}, nil); err == nil {
		t.Errorf("an image that is not there: %+v", m)
	}
	// In a directory that is named: links in it that lead elsewhere are
	// nobody's business.
	linked := t.TempDir()
	link := filepath.Join(linked, "a.hds")
	if err := os.Symlink(root, link); err != nil {
		t.Fatal(err)
	}
	desc, err := os.ReadFile(filepath.Join(dir, ploop.DescriptorName))
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := t.TempDir()
	write(filepath.Join(elsewhere, "d.xml"), strings.ReplaceAll(string(desc), ploop.RootName, root))
	if m := members(t, root, elsewhere); len(m) != 2 {
		t.Errorf("%+v", m)
	}
	if err := os.Symlink(filepath.Join(elsewhere, "d.xml"), filepath.Join(linked, "d.xml")); err != nil {
		t.Fatal(err)
	}
	if m := members(t, root, linked); len(m) != 1 {
		t.Errorf("%+v", m)
	}
	if m := members(t, root, linked, elsewhere); len(m) != 3 {
		t.Errorf("%+v", m)
	}
	// What is damaged.
	broken := filepath.Join(elsewhere, "broken.xml")
	for text, unclear := range map[string]bool{
		"<domain/>": false,
		"<":         false,
		strings.Replace(string(desc), "<Storage>", "<Storage></Storage><Storage>", 1): true,
	} {
		write(broken, text)
		m, err := open.MembersOf([]string{root}, nil, elsewhere)
		if err != nil || slices.Contains(m.Unclear, broken) != unclear {
			t.Errorf("%.40s: %+v, %v", text, m, err)
		}
	}
	write(filepath.Join(dir, ploop.DescriptorName), "<")
	for _, path := range []string{root, link} {
		if _, err := open.MembersOf([]string{path}, nil); err == nil {
			t.Errorf("%s: a descriptor that cannot be read is no error", path)
		}
	}
	if m, err := open.MembersOf([]string{broken}, nil, dir); err != nil || !slices.Contains(m.Unclear, filepath.Join(dir, ploop.DescriptorName)) {
		t.Errorf("%+v, %v", m, err)
	}
	if _, err := open.MembersOf([]string{root}, nil, filepath.Join(dir, "nowhere")); err == nil {
		t.Error("a directory that is not there")
	}
}

// TestMembersOfStack: the lower image has the upper one as its child, under
// whatever name the bundle has for it.
func TestMembersOfStack(t *testing.T) {
	imgtest.RequirePloop(t)
	dir := t.TempDir()
	images := imgtest.PloopBundle(t, dir, "expanded", 2, 16<<20, 2)
	upper, lower := images[0].Path, images[1].Path
	m := members(t, lower)
	if len(m) != 1 || m[0].Images != 2 || !slices.Equal(m[0].Children, []string{upper}) || len(m[0].Parents) != 0 {
		t.Errorf("%+v", m)
	}
	m = members(t, upper)
	if len(m) != 1 || len(m[0].Children) != 0 || !slices.Equal(m[0].Parents, []string{lower}) {
		t.Errorf("%+v", m)
	}
	// A second name for the lower one, on which a third image stands.
	const low, high = "{11111111-1111-1111-1111-111111111111}", "{22222222-2222-2222-2222-222222222222}"
	if err := os.Link(lower, filepath.Join(dir, "alias")); err != nil {
		t.Fatal(err)
	}
	xml := filepath.Join(dir, ploop.DescriptorName)
	b, err := os.ReadFile(xml)
	if err != nil {
		t.Fatal(err)
	}
	image := func(guid, file string) string {
		return "<Image><GUID>" + guid + "</GUID><Type>Compressed</Type><File>" + file + "</File></Image>"
	}
	shot := func(guid, parent string) string {
		return "<Shot><GUID>" + guid + "</GUID><ParentGUID>" + parent + "</ParentGUID></Shot>"
	}
	text := strings.Replace(string(b), "</Storage>", image(low, "alias")+image(high, "third")+"</Storage>", 1)
	text = strings.Replace(text, "</Snapshots>", shot(low, "{00000000-0000-0000-0000-000000000000}")+shot(high, low)+"</Snapshots>", 1)
	if err := os.WriteFile(xml, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if m := members(t, lower); len(m) != 1 || !slices.Equal(m[0].Children, []string{upper, filepath.Join(dir, "third")}) {
		t.Errorf("%+v", m)
	}
}
